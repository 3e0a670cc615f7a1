"""Drives modtrain by its command line alone, and reads what it leaves in a run's directory.

Nothing of the package is imported: modules may move and change name under this.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
_WORDS = ["the", "a", "tree", "river", "stone", "walks", "sings", "under", "old", "quiet", "and"]
_TIMEOUT = 600


def git(*arguments: str) -> str:
    """Return what git prints in this checkout."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=-1).stdout.strip()


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check ``commit`` out in a temporary git worktree."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "modtrain"
        git("worktree", "add", "--detach", str(root), commit)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def write_corpus(folder: Path, documents: int, longest: int) -> None:
    """Write ``documents`` texts of 20 to ``longest`` words, the same at every call."""
    folder.mkdir(parents=True)
    draw = random.Random(7)
    for number in range(documents):
        words = draw.choices(_WORDS, k=draw.randint(20, longest))
        (folder / f"{number:03d}.txt").write_text(" ".join(words))


@dataclass(frozen=True)
class Program:
    """modtrain as started in ``folder``, by default the one of this checkout and environment.

    Raises RuntimeError with the output where a command fails.
    """

    folder: Path
    root: Path = ROOT
    python: str = sys.executable

    def run(self, *arguments: str, processes: int = 1) -> str:
        """Run ``modtrain *arguments`` to its end, under torchrun where ``processes`` > 1."""
        process = self._start(arguments, processes)
        try:
            output = process.communicate(timeout=_TIMEOUT)[0]
        finally:
            _end(process)
        if process.returncode:
            raise RuntimeError(f"modtrain {' '.join(arguments)}: {process.returncode}\n{output}")
        return output

    def interrupt(
        self, run: str, step: int, signum: int, *arguments: str, processes: int = 1
    ) -> None:
        """Train, and send ``signum`` when the checkpoint of ``step`` is there.

        torchrun passes SIGTERM on to its ranks, which then save once more; SIGKILL it cannot.
        """
        process = self._start(("train", f"name={run}", *arguments), processes)
        checkpoint = self.folder / run / f"checkpoints/step-{step:09d}"
        deadline = time.monotonic() + _TIMEOUT
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signum)
        _end(process)
        if not checkpoint.exists() or (self.folder / run / "COMPLETED").exists():
            output = process.communicate()[0]
            raise RuntimeError(f"{run} was not interrupted after step {step}:\n{output}")

    def weights_digest(self, run: str) -> str:
        """Consolidate the newest checkpoint; return a digest over names, dtypes, shapes, values."""
        path = self.folder / f"{run}.safetensors"
        self.run("checkpoints", f"run={run}", "action=consolidate", f"output={path}", "runs_dir=.")
        digest = hashlib.sha256()
        for name, values in sorted(load_file(path).items()):
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()

    def metrics(self, run: str) -> dict[str, list[float]]:
        """Return the losses and gradient norms of all steps, of other metrics the last value."""
        series: dict[str, list[float]] = {}
        for line in (self.folder / run / "metrics.jsonl").read_text().splitlines():
            for name, value in json.loads(line).items():
                if not name.startswith("throughput/"):
                    series.setdefault(name, []).append(value)
        return {
            name: values if "loss" in name or name == "grad_norm" else values[-1:]
            for name, values in series.items()
        }

    def evaluate(self, run: str, *arguments: str) -> dict[str, Any]:
        """Return the figures of ``modtrain eval``."""
        self.run("eval", f"run={run}", "runs_dir=.", "accelerator=cpu", *arguments)
        (path,) = (self.folder / run).glob("eval-*.json")
        figures: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        del figures["run"]
        return figures

    def generate(self, run: str, *arguments: str) -> list[dict[str, Any]]:
        """Return texts, lengths and depths of three continuations, run two at a time."""
        prompts, output = self.folder / f"{run}-prompts.jsonl", self.folder / f"{run}-texts.jsonl"
        texts = ["the", "quiet river sings under the old stone", ""]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        paths = (f"run={run}", "runs_dir=.", f"input={prompts}", f"output={output}")
        settings = ("accelerator=cpu", "max_tokens=24", "batch_size=2", "show_depth=true")
        self.run("generate", *paths, *settings, *arguments)
        return [json.loads(line) for line in output.read_text().splitlines()]

    def _start(self, arguments: tuple[str, ...], processes: int) -> subprocess.Popen[str]:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        return subprocess.Popen(
            [self.python, "-m", *(torchrun if processes > 1 else []), "modtrain", *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root)},
            start_new_session=True,
        )


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a process that was signalled; end one that hangs, torchrun's ranks with it."""
    try:
        process.wait(timeout=0 if process.returncode is not None else 60)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(timeout=60)
