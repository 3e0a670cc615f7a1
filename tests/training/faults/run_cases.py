"""Small runs on ranks, with each rank's samples noted, for tests that break and resume them."""

import json
import os
import signal
import zlib
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback

from modtrain.cli.compose import compose
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.dataset import TokenDataset
from modtrain.training.callbacks import evaluation as held_out
from modtrain.training.run import train
from modtrain.training.stop_signal import STOP
from tests.helpers.runs import before_step, request_stop, run_lines

SEQ_LEN, SEQUENCES = 64, 8
EXPERTS = ("model.experts.count=4", "model.experts.dim=16", "model.experts.top_k=2")


def overrides(prepared: Path, runs: Path, name: str, steps: int, *more: str) -> list[str]:
    """A run of ``steps`` steps, each of eight sequences: 1, 2 and 4 data-parallel ranks fit."""
    return run_lines(
        *(prepared, runs, name, f"budget.steps={steps}", f"batch.tokens={SEQUENCES * SEQ_LEN}"),
        *("batch.micro_batch_size=1", "checkpoint.keep_last=2"),
        *("eval.every=4", "eval.sequences=4", "eval.batch_size=1", *more),
    )


class Noted(L.Callback):
    """Records which samples a rank trained on, by their contents, not by the loader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: dict[bytes, int] = {}

    def on_train_start(self, trainer, _module) -> None:
        data: TokenDataset = trainer.datamodule.train_data
        rows = data.__getitems__(list(range(len(data))))
        self.numbers = {row.numpy().tobytes(): number for number, row in enumerate(rows)}
        assert len(self.numbers) == len(data), "samples with the same text cannot be distinguished"

    def on_train_batch_end(self, trainer, _module, _outputs, batch, batch_idx) -> None:
        plan = trainer.datamodule.plan()
        step, micro = divmod(batch_idx, plan.accumulate)
        tokens_BT = torch.cat([batch.inputs_BS, batch.targets_BS[:, -1:]], dim=1)
        numbers = [self.numbers[row.numpy().tobytes()] for row in tokens_BT]
        record = [step, micro * plan.world_size + plan.rank, numbers]
        with (self.path / f"samples-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def samples_by_step(folder: Path) -> dict[int, list[int]]:
    """The samples of each step in the order of the stream, as they were trained on last."""
    samples: dict[int, dict[int, list[int]]] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for step, place, numbers in map(json.loads, path.read_text().splitlines()):
            samples.setdefault(step, {})[place] = numbers
    return {
        step: [number for place in sorted(places) for number in places[place]]
        for step, places in sorted(samples.items())
    }


def run(lines: list[str], notes: str | None = None, stop: tuple[int, int] | None = None) -> str:
    """Train. stop: (step, rank) at which that rank alone gets a stop request."""
    callbacks: list[L.Callback] = [] if notes is None else [Noted(Path(notes))]
    if stop is not None:
        step, rank = stop
        before_step(step, request_stop, rank=rank)
    STOP.signum = None
    return train(compose("train", lines), callbacks).status


def run_stopped_in_setup(lines: list[str], rank: int) -> str:
    """Train; a real SIGTERM comes to ``rank`` alone while Lightning sets up."""
    original = TokenDataModule.train_dataloader

    def train_dataloader(data: TokenDataModule):
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(data)

    TokenDataModule.train_dataloader = train_dataloader
    STOP.install()
    return run(lines)


def run_drawing(lines: list[str]) -> list[int]:
    """Train; return what the random state is at the start of each step."""
    states: list[int] = []

    def note(*_: object) -> None:
        states.append(zlib.crc32(torch.get_rng_state().numpy().tobytes()))

    STOP.signum = None
    train(compose("train", lines), [LambdaCallback(on_train_batch_start=note)])
    return states


def run_showing_evaluations(lines: list[str], mark: str) -> str:
    """Train; the file ``mark`` is there while an evaluation runs."""
    original = held_out.evaluate

    def evaluate(*arguments, **named):
        Path(mark).touch()
        try:
            return original(*arguments, **named)
        finally:
            Path(mark).unlink(missing_ok=True)

    held_out.evaluate = evaluate
    return run(lines)
