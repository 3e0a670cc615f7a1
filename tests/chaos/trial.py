"""One run that is interrupted again and again, held against the one that never was."""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from modtrain.checkpoint.recovery import latest
from tests.chaos.damages import DAMAGES
from tests.helpers.ranks import Fleet, RankFailedError
from tests.helpers.runs import last_step, losses_of
from tests.helpers.saved import newest_weights
from tests.training.faults.run_cases import overrides, run, samples_by_step

STEPS = 24
# How ranks are started: their number, and the strategy. One is always kept to in half of all runs.
LAYOUTS = {
    "single": (1, ("strategy=single",)),
    "ddp, 2 ranks": (2, ("strategy=ddp",)),
    "fsdp, 2 ranks": (2, ("strategy=fsdp",)),
    "fsdp_tp, 2 ranks": (2, ("strategy=fsdp_tp", "strategy.tensor_parallel=2")),
    "fsdp_cp, 2 ranks": (2, ("strategy=fsdp_cp", "strategy.context_parallel=2")),
    "hsdp, 4 ranks": (4, ("strategy=hsdp", "strategy.shard_size=2")),
    "deepspeed_2, 2 ranks": (2, ("strategy=deepspeed_2",)),
}
# Rounding differs between layouts, and grows over the steps.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 5e-3
PROMISES = {
    "ends": "every rank ends after an interruption, within 90 s",
    "continues": "the next start continues, whatever was damaged",
    "newest": "from the newest whole checkpoint",
    "samples": "each step reads its samples, in one order, on any layout",
    "records": "each step is recorded once, and loses nothing",
    "losses": "losses equal those of the run never broken",
    "weights": "so do the final weights, to the bit on one layout",
}


@dataclass
class Tally:
    """How often each promise was tried, and where it was broken."""

    tried: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, str]] = field(default_factory=list)
    interruptions: Counter[str] = field(default_factory=Counter)

    def check(self, promise: str, is_kept: bool, where: str) -> None:
        self.tried[promise] += 1
        if not is_kept:
            self.broken.append((promise, where))


def run_into(lines: list[str], notes: str, log: str) -> str:
    """Train with all output in a file, which a rank that is killed leaves as well."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    return run(lines, notes)


@dataclass
class Trial:
    """A run and what befalls it. Everything follows from ``seed``.

    whole: the directory of each layout's run that was never broken, made when it is needed.
    """

    prepared: Path
    folder: Path
    seed: int
    tally: Tally
    whole: dict[str, Path]

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.name = f"trial-{self.seed}"
        self.run, self.log = self.folder / self.name, self.folder / f"{self.name}.log"
        self.layouts: list[str] = []
        self.history: list[str] = []

    def play(self, num_interruptions: int) -> int:
        """Interrupt the run so often, let it end, and compare; return how often it could be."""
        own = list(LAYOUTS)
        if self.draw.random() < 0.5:
            own = [self.draw.choice(own)]
        expected = "complete"
        for number in range(num_interruptions):
            outcomes = self._interrupt(self.draw.choice(own), number, num_interruptions)
            if set(outcomes) == {"complete"}:
                # SIGTERM came after the last step.
                expected = "already complete"
                break
            if self.draw.random() < 0.5:
                self._damage()
        layout = self.draw.choice(own)
        outcomes = self._start(layout, None)
        is_complete = set(outcomes) == {expected}
        self.tally.check("continues", is_complete, f"{self._where()}: {outcomes}")
        if is_complete:
            self._compare()
        return number + 1

    def _start(self, layout: str, stop: tuple[int, float] | None) -> list[str]:
        """Start the run, and interrupt it at (step, seconds); return how its ranks ended."""
        world_size, more = LAYOUTS[layout]
        self.layouts.append(layout)
        self.history.append(layout)
        newest = latest(self.run / "checkpoints")
        notes = self.folder / f"{self.name}-notes" / str(len(self.layouts))
        notes.mkdir(parents=True)
        lines = overrides(
            *(self.prepared, self.folder, self.name, STEPS, "checkpoint.keep_last=3"),
            # Ranks that wait for one that was killed before it connected give up after it.
            *("strategy.timeout=20", *more),
        )
        with Fleet(run_into, world_size, lines, str(notes), str(self.log), joins=False) as fleet:
            if stop is not None:
                self._strike(fleet, world_size, *stop)
            try:
                outcomes = fleet.outcomes(timeout=90 if stop else 240)
                self.tally.check("ends", True, "")
            except TimeoutError as error:
                self.tally.check("ends", False, f"{self._where()}: {error}")
                outcomes = []
        self._check_notes(notes, 0 if newest is None else newest[0])
        return [f"{o.kind}: {o.message}" if isinstance(o, RankFailedError) else o for o in outcomes]

    def _strike(self, fleet: Fleet, world_size: int, step: int, delay: float) -> None:
        while fleet.is_running() and last_step(self.run) < step:
            time.sleep(0.005)
        time.sleep(delay)
        if not fleet.is_running():
            return
        if self.draw.random() < 0.2:
            self.tally.interruptions["SIGTERM to all ranks"] += 1
            self.history.append("SIGTERM")
            fleet.signal(signal.SIGTERM)
        else:
            victims = self.draw.sample(range(world_size), self.draw.randint(1, world_size))
            kind = "all" if len(victims) == world_size else "some"
            self.tally.interruptions[f"SIGKILL of {kind} ranks"] += 1
            self.history.append(f"SIGKILL of {victims}")
            fleet.signal(signal.SIGKILL, *victims)

    def _interrupt(self, layout: str, number: int, total: int) -> list[str]:
        """Start and interrupt: in the set-up, or at a step further on each time."""
        far = max(1, (number + 1) * (STEPS - 2) // total)
        step = 0 if self.draw.random() < 0.15 else min(STEPS - 2, self.draw.randint(1, far))
        delay = self.draw.uniform(0, 3.0 if step == 0 else 0.3)
        outcomes = self._start(layout, (step, delay))
        ends = ("died:", "RankError:", "stopped", "complete", "SystemExit:")
        errors = [text for text in outcomes if not text.startswith(ends)]
        self.tally.check("continues", not errors, f"{self._where()}: {errors}")
        return outcomes

    def _damage(self) -> None:
        damages = [*DAMAGES]
        self.draw.shuffle(damages)
        for damage in damages:
            if self.run.is_dir() and damage(self.run, self.draw):
                name = damage.__name__.replace("_", " ")
                self.tally.interruptions[name] += 1
                self.history.append(name)
                return

    def _check_notes(self, notes: Path, newest: int) -> None:
        """Compare what a start read with what the run never broken did."""
        reference = samples_by_step(self._reference("single") / "notes")
        read = samples_by_step(notes)
        if not read:
            return
        first = min(read)
        self.tally.check("newest", first == newest, f"{self._where()}: {first}, not {newest}")
        # The last step may have been cut short.
        alike = all(read[step] == reference[step] for step in sorted(read)[:-1])
        self.tally.check("samples", alike, self._where())

    def _reference(self, layout: str) -> Path:
        if layout not in self.whole:
            name = f"whole-{len(self.whole)}"
            world_size, more = LAYOUTS[layout]
            lines = overrides(self.prepared, self.folder, name, STEPS, *more)
            notes = self.folder / name / "notes"
            notes.mkdir(parents=True)
            log = str(self.folder / f"{name}.log")
            with Fleet(run_into, world_size, lines, str(notes), log, joins=False) as fleet:
                outcomes = fleet.outcomes(timeout=240)
            if set(outcomes) != {"complete"}:
                raise RuntimeError(f"{layout} does not train without interruptions: {outcomes}")
            self.whole[layout] = self.folder / name
        return self.whole[layout]

    def _compare(self) -> None:
        is_one_layout = len(set(self.layouts)) == 1
        reference = self._reference(self.layouts[0] if is_one_layout else "single")
        losses, expected = losses_of(self.run), losses_of(reference)
        self.tally.check("records", list(losses) == list(expected), self._where())
        tolerance = 0.0 if is_one_layout else LOSS_TOLERANCE
        far = [step for step in losses if abs(losses[step] - expected[step]) > tolerance]
        self.tally.check("losses", not far, f"{self._where()}: steps {far}")
        ours, theirs = newest_weights(self.run, STEPS), newest_weights(reference, STEPS)
        tolerance = 0.0 if is_one_layout else WEIGHT_TOLERANCE
        other = [n for n in theirs if (ours[n] - theirs[n]).abs().max() > tolerance]
        self.tally.check("weights", not other, f"{self._where()}: {other}")

    def _where(self) -> str:
        return f"seed {self.seed}: {'; '.join(self.history)}"
