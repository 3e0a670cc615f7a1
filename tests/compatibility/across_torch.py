"""Runs that change their torch at each stop: ``python -m tests.compatibility.across_torch ENV...``

Each environment is a folder with modtrain and a torch of its own, as `make compat` makes them. A
run is started by the first, stopped and resumed by the next, in turn, and compared with one that
the first alone trains.
"""

import signal
import sys
import tempfile
from pathlib import Path

from tests.compatibility.runs import PREPARE, PROCESSES, TRAIN
from tests.parity.program import Program, write_corpus

STOPS = (8, 16, 24, 32)


def main(environments: list[str]) -> None:
    """Print the largest difference between losses of each run with changes and without."""
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus", documents=24, longest=60)
        pythons = [str(Path(path).absolute() / "bin/python") for path in environments]
        programs = [Program(Path(folder), python=python) for python in pythons]
        programs[0].run("prepare", *PREPARE)
        for name in TRAIN:
            keys = (*TRAIN[name], "budget.steps=64")
            processes = PROCESSES[name]
            programs[0].run("train", "name=whole", *keys, processes=processes)
            for number, step in enumerate(STOPS):
                program = programs[number % len(programs)]
                program.interrupt("changed", step, signal.SIGTERM, *keys, processes=processes)
            last = programs[len(STOPS) % len(programs)]
            last.run("train", "name=changed", *keys, processes=processes)
            whole, changed = (last.metrics(run)["loss"] for run in ("whole", "changed"))
            difference = max(abs(a - b) for a, b in zip(whole, changed, strict=True))
            print(f"{name}: {len(whole)} steps, losses differ by {difference:.1e} at most")
            for run in ("whole", "changed"):
                (last.folder / run).rename(last.folder / f"{run}_{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
