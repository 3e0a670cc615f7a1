"""Interrupt runs at random until the time is up, and print which promises held.

A run is started under a random strategy on a random number of ranks; some ranks are killed, or all
get a signal, at a random moment, saves and evaluations included; a random file is damaged; and so
on, until it is let end and compared with the run that nothing befell. ``--seed`` repeats a trial.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modtrain.data.prepare.pipeline import prepare
from tests.chaos.trial import PROMISES, Tally, Trial
from tests.data.data_cases import make_documents, tiny_config, write_jsonl
from tests.training.faults.run_cases import SEQ_LEN


def make_data(folder: Path) -> Path:
    """Prepare a corpus for runs of `tests.training.faults.run_cases`."""
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(400))
    prepare(tiny_config([corpus], folder / "data", seq_len=SEQ_LEN), progress=False)
    return folder / "data"


def play(folder: Path, seed: int, interruptions: int, minutes: float, per_run: int = 8) -> Tally:
    """Play trials until there were so many interruptions, or the time is up."""
    tally, whole, deadline = Tally(), {}, time.monotonic() + 60 * minutes
    prepared = make_data(folder)
    played = 0
    while played < interruptions and time.monotonic() < deadline:
        number = min(per_run, interruptions - played)
        played += Trial(prepared, folder, seed, tally, whole).play(number)
        seed += 1
    return tally


def show(tally: Tally, console: Console) -> None:
    """Print the promises with their trials, and what was done."""
    table = Table("promise", "trials", "broken")
    for promise, text in PROMISES.items():
        broken = sum(name == promise for name, _ in tally.broken)
        table.add_row(text, str(tally.tried[promise]), str(broken))
    console.print(table)
    for what, count in tally.interruptions.most_common():
        console.print(f"{count:>5}  {what}")
    for promise, where in tally.broken:
        console.print(f"BROKEN  {PROMISES[promise]}\n        {where}", style="red")


def main() -> int:
    """Return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="time limit; 60 by default")
    parser.add_argument("--interruptions", type=int, default=200, help="number; 200 by default")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; 0 by default")
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay")
    arguments = parser.parse_args()
    # Of the files that are damaged here; what the runs print is in their logs.
    logging.getLogger("modtrain").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tally = play(folder, arguments.seed, arguments.interruptions, arguments.minutes)
    show(tally, Console(width=120))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
