"""What a disk, a person or a power cut does to one file of a run that is not running.

None of it may stop the next start: what is only recorded of a run is set aside, and of the
checkpoints there is an older one.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from modtrain.checkpoint.recovery import whole_checkpoints
from tests.helpers.saved import flip_bit

Damage = Callable[[Path, random.Random], bool]


def _newest_of_several(run: Path) -> Path | None:
    """The newest whole checkpoint, if there is another one to resume from."""
    whole = whole_checkpoints(run / "checkpoints")
    return whole[-1][1] if len(whole) > 1 else None


def _a_file_of(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def flip_a_bit_of_the_newest_checkpoint(run: Path, draw: random.Random) -> bool:
    newest = _newest_of_several(run)
    if newest is not None:
        file = _a_file_of(newest, draw)
        flip_bit(file, draw.randrange(file.stat().st_size))
    return newest is not None


def truncate_a_file_of_the_newest_checkpoint(run: Path, draw: random.Random) -> bool:
    newest = _newest_of_several(run)
    if newest is not None:
        file = _a_file_of(newest, draw)
        with file.open("r+b") as opened:
            opened.truncate(draw.randrange(file.stat().st_size))
    return newest is not None


def remove_a_file_of_the_newest_checkpoint(run: Path, draw: random.Random) -> bool:
    newest = _newest_of_several(run)
    if newest is not None:
        _a_file_of(newest, draw).unlink()
    return newest is not None


def remove_the_newest_checkpoint(run: Path, _draw: random.Random) -> bool:
    newest = _newest_of_several(run)
    if newest is not None:
        shutil.rmtree(newest)
    return newest is not None


def copy_the_oldest_checkpoint_to_another_name(run: Path, _draw: random.Random) -> bool:
    whole, copy = whole_checkpoints(run / "checkpoints"), run / "checkpoints" / "step-best"
    if not whole or copy.exists():
        return False
    shutil.copytree(whole[0][1], copy)
    return True


def add_a_line_to_the_metrics(run: Path, draw: random.Random) -> bool:
    file = run / "metrics.jsonl"
    if not file.is_file():
        return False
    lines = file.read_bytes().splitlines(keepends=True)
    bad = draw.choice([b"\xff\xfe\n", b"null\n", b'{"step": 3\n', b"[1, 2]\n", b"\n"])
    lines.insert(draw.randint(0, len(lines)), bad)
    file.write_bytes(b"".join(lines))
    return True


def cut_the_last_line_of_the_metrics(run: Path, draw: random.Random) -> bool:
    file = run / "metrics.jsonl"
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - draw.randint(1, 20))
    return True


def damage_the_manifest(run: Path, draw: random.Random) -> bool:
    file = run / "manifest.json"
    if not file.is_file():
        return False
    content = file.read_bytes()
    file.write_bytes(draw.choice([content[: len(content) // 2], b"", b"[" * 200_000, b"null"]))
    return True


def remove_what_is_recorded_of_the_run(run: Path, draw: random.Random) -> bool:
    """Not the metrics: of these nothing else has a copy."""
    names = ("config.yaml", "manifest.json", "command.txt", "saved_step")
    there = [name for name in names if (run / name).is_file()]
    # Without any whole checkpoint the configuration is all that there is of the run.
    if not there or not whole_checkpoints(run / "checkpoints"):
        return False
    (run / draw.choice(there)).unlink()
    return True


def leave_a_mark_of_the_end(run: Path, _draw: random.Random) -> bool:
    (run / "COMPLETED").touch()
    return True


def leave_a_half_written_checkpoint(run: Path, draw: random.Random) -> bool:
    whole = whole_checkpoints(run / "checkpoints")
    if not whole:
        return False
    half = run / "checkpoints" / f".writing-{draw.randrange(10**6)}"
    shutil.copytree(whole[-1][1], half)
    _a_file_of(half, draw).unlink()
    return True


def damage_the_journal(run: Path, draw: random.Random) -> bool:
    lines = ["null", "{", json.dumps({"action": "skip"}), "\x00"]
    (run / "events.jsonl").write_text(draw.choice(lines) + "\n")
    return True


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit_of_the_newest_checkpoint,
    truncate_a_file_of_the_newest_checkpoint,
    remove_a_file_of_the_newest_checkpoint,
    remove_the_newest_checkpoint,
    copy_the_oldest_checkpoint_to_another_name,
    add_a_line_to_the_metrics,
    cut_the_last_line_of_the_metrics,
    damage_the_manifest,
    remove_what_is_recorded_of_the_run,
    leave_a_mark_of_the_end,
    leave_a_half_written_checkpoint,
    damage_the_journal,
)
