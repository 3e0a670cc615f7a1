"""Keep stopped runs of a commit: ``python -m tests.compatibility.record COMMIT``."""

import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.compatibility.runs import FOLDER, PREPARE, PROCESSES, TRAIN, keys_of, results_of
from tests.parity.program import Program, checkout, write_corpus
from tests.parity.records import dump, fingerprint


def record(commit: str) -> None:
    """Train, stop, keep and resume each run by the program as of ``commit``.

    Raises RuntimeError if a resumed run does not end as one that was never stopped.
    """
    results = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        checkout(commit) as root,
        tarfile.open(FOLDER / f"{commit}.tar.xz", "x:xz") as archive,
    ):
        program = Program(Path(folder), root)
        write_corpus(program.folder / "corpus", documents=24, longest=60)
        program.run("prepare", *PREPARE)
        archive.add(program.folder / "prepared", "prepared")
        for name in TRAIN:
            overrides = keys_of(root, TRAIN[name])
            program.run("train", f"name={name}", *overrides, processes=PROCESSES[name])
            whole = program.metrics(name), program.weights_digest(name)
            shutil.rmtree(program.folder / name)
            program.interrupt(name, 8, signal.SIGTERM, *overrides, processes=PROCESSES[name])
            program.run("checkpoints", f"run={name}", "runs_dir=.", "action=prune", "keep_last=1")
            archive.add(program.folder / name, name)
            results[name] = results_of(program, name)
            if (results[name]["metrics"], results[name]["weights"]) != whole:
                raise RuntimeError(f"{name} does not end as it does when it is not stopped")
    expected = {"machine": fingerprint(), "runs": results}
    (FOLDER / f"{commit}.json").write_text(dump(expected) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
