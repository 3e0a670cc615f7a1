"""Ranks killed without warning at any moment: the run resumes to the very same bits."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import Fleet, on_ranks
from tests.helpers.runs import last_step, losses_of
from tests.helpers.saved import assert_same_bits, newest_tensors
from tests.training.faults.run_cases import EXPERTS, overrides, run_showing_evaluations

STEPS = 24
MOMENTS = ("step", "save", "evaluation", "first step")
KILLS = {"ddp": 8, "fsdp": 11, "fsdp_tp": 5, "fsdp_ep": 3, "deepspeed_2": 5}


def wait_for(moment: str, step: int, root: Path, mark: Path, fleet: Fleet) -> None:
    """Return at that moment, or when the ranks are through."""

    def is_now() -> bool:
        if moment == "first step":
            return (root / "config.yaml").exists()
        if last_step(root) < step:
            return False
        if moment == "save":
            return any((root / "checkpoints").glob(".writing-*"))
        return moment == "step" or mark.exists()

    while fleet.is_running() and not is_now():
        time.sleep(0.001)


def kill_once(lines: list[str], moment: str, step: int, draw: random.Random, root: Path) -> bool:
    """Start the run and kill one rank or all of it; return whether it was still running."""
    mark = root.with_name("evaluating")
    with Fleet(run_showing_evaluations, 2, lines, str(mark), joins=False) as fleet:
        wait_for(moment, step, root, mark, fleet)
        # Preparing takes longer than any one step.
        time.sleep(draw.uniform(0, 1.5 if moment == "first step" else 0.02))
        victims = draw.choice([(0,), (1,), (0, 1)])
        was_running = fleet.is_running()
        fleet.signal(signal.SIGKILL, *victims)
        # The other ranks have to end without help.
        fleet.outcomes(timeout=90)
    mark.unlink(missing_ok=True)
    return was_running


@pytest.mark.on_commit("fsdp")
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("strategy", "kills"), KILLS.items(), ids=KILLS)
def test_kills_at_any_moment_change_nothing(prepared, tmp_path, strategy, kills):
    more = (f"strategy={strategy}", *(EXPERTS if strategy == "fsdp_ep" else ()))
    # Ranks that wait for one that was killed before it connected give up after the time-out.
    more += ("eval.every=3", "checkpoint.every=1", "strategy.timeout=20")
    whole = overrides(prepared, tmp_path, "whole", STEPS, *more)
    mark = str(tmp_path / "evaluating")
    assert on_ranks(run_showing_evaluations, 2, whole, mark, joins=False) == ["complete"] * 2
    draw = random.Random(f"{strategy} {kills}")
    resumed, root = overrides(prepared, tmp_path, "cut", STEPS, *more), tmp_path / "cut"
    killed = 0
    for number in range(kills):
        # The first one before anything is saved; then further and further.
        moment = MOMENTS[(number - 1) % len(MOMENTS)]
        step = round(number * (STEPS - 6) / kills)
        killed += kill_once(resumed, moment, step, draw, root)
    assert killed == kills
    assert on_ranks(run_showing_evaluations, 2, resumed, mark, joins=False) == ["complete"] * 2
    assert_same_bits(*(newest_tensors(tmp_path / name, STEPS) for name in ("whole", "cut")))
    losses = losses_of(root)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == losses_of(tmp_path / "whole")
