"""Check that the program computes what it computed: to the last bit on the same machine.

`tests.parity.cases` are run by the command line. Metrics, weights, evaluations and generated texts
are compared with those in ``recorded.json``: bit by bit with this machine's, or else with another
machine's, floats within a tolerance. ``record`` writes what this machine computes; with ``--base
COMMIT`` what that commit does, run by the commit's own copy of these files.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.parity.cases import CASES, PREPARE, TRAIN, Case
from tests.parity.program import ROOT, Program, checkout, git, write_corpus
from tests.parity.records import differences, dump, fingerprint

PROGRAM = ("modtrain", "conf")
RECORDED = Path(__file__).with_name("recorded.json")
# Results with AVX2 and with AVX-512 were 2e-6 apart at most.
TOLERANCE = 1e-5


def results_of(program: Program, name: str, case: Case) -> dict[str, Any]:
    """Train one case and return all that is compared of it."""
    train = (f"name={name}", *TRAIN, *case.train)
    if case.killed:
        program.interrupt(name, 4, signal.SIGKILL, *TRAIN, *case.train)
    program.run("train", *train, processes=case.processes)
    results: dict[str, Any] = {
        "metrics": program.metrics(name),
        "weights": program.weights_digest(name),
    }
    for label, overrides in case.generate.items():
        results[label] = program.generate(name, *overrides)
    if case.evaluate is not None:
        results["evaluation"] = program.evaluate(name, *case.evaluate)
    return results


def measure(names: list[str]) -> dict[str, Any]:
    """Return the results of the cases ``names``, two of which run at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        program = Program(Path(folder))
        write_corpus(program.folder / "corpus", documents=60, longest=120)
        program.run("prepare", *PREPARE)
        jobs = {name: pool.submit(results_of, program, name, CASES[name]) for name in names}
        return {name: job.result() for name, job in jobs.items()}


def check(names: list[str], tolerance: float | None) -> list[str]:
    """Return where the results differ from the recorded ones."""
    machine, records = fingerprint(), json.loads(RECORDED.read_text())
    if machine not in records and tolerance is None:
        tolerance = TOLERANCE
        print(f"nothing is recorded of this machine ({machine}), see `make parity-record`;")
        print(f"compared with {next(iter(records))} within {tolerance}")
    recorded = records.get(machine) or next(iter(records.values()))
    known = {name: dict(recorded.get(name, {})) for name in names}
    for case in known.values():
        case.pop("commit", None)
    return differences(known, measure(names), tolerance)


def record(names: list[str]) -> None:
    """Write this machine's results of the cases ``names`` to ``recorded.json``."""
    records = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    # The last commit that changed the program, with a mark where it is changed beside.
    commit = git("log", "-1", "--format=%h", "--", *PROGRAM)
    commit += " and changes" if git("status", "--porcelain", "--", *PROGRAM) else ""
    cases = records.get(fingerprint(), {})
    cases |= {name: {"commit": commit, **results} for name, results in measure(names).items()}
    records[fingerprint()] = {name: cases[name] for name in sorted(cases) if name in CASES}
    RECORDED.write_text(dump(records) + "\n")


def record_from(base: str, names: list[str]) -> None:
    """Write the results of the program as of the commit ``base``."""
    with checkout(base) as root:
        theirs = root / RECORDED.relative_to(ROOT)
        theirs.write_bytes(RECORDED.read_bytes())
        # Cases that it has not yet are left out, unless they are asked for by name.
        chosen = [] if names == list(CASES) else ["--cases", *names]
        command = [sys.executable, "-m", "tests.parity", "record", *chosen]
        subprocess.run(command, cwd=root, check=True)
        RECORDED.write_bytes(theirs.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("action", choices=("check", "record"), nargs="?", default="check")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", choices=list(CASES), default=list(CASES)
    )
    parser.add_argument("--base", metavar="COMMIT", help="record the program as of this commit")
    parser.add_argument("--tolerance", type=float, help="compare floats alone, within this")
    arguments = parser.parse_args()
    if arguments.action == "record":
        if arguments.base:
            record_from(arguments.base, arguments.cases)
        else:
            record(arguments.cases)
        return 0
    differing = check(arguments.cases, arguments.tolerance)
    print("\n".join(differing) or f"{len(arguments.cases)} cases: as recorded")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
