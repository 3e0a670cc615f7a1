"""What tests share: a small corpus, prepared once, and the command line as a process."""

import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modtrain.common.torch_compat import HAS_PARAMETER_MESHES
from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare.pipeline import prepare
from modtrain.training.stop_signal import STOP, STOP_SIGNALS

# A shell's background jobs ignore Ctrl-C, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

NEEDS_TORCH_2_12 = ("needs torch 2.12 or newer", "cannot shard experts over their own mesh")
WORDS = ["the", "a", "tree", "river", "stone", "walks", "sings", "under", "old", "quiet", "and"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the nightly tier the cases of a test that its mark `on_commit` does not keep.

    ``on_commit(3)`` keeps three of them, spread over the list; ``on_commit("power cut")`` those of
    these names. Where some cases are marked slow and others not, those that are not are kept from.
    """
    tests: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("on_commit"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for cases in tests.values():
        kept = _kept_on_commit(cases)
        for case in cases:
            if case not in kept:
                case.add_marker(pytest.mark.nightly)


def _kept_on_commit(cases: list[pytest.Function]) -> list[pytest.Function]:
    mark = cases[0].get_closest_marker("on_commit")
    assert mark is not None
    if isinstance(mark.args[0], str):
        by_name = {case.callspec.id: case for case in cases}
        return [by_name[name] for name in mark.args if name in by_name]
    quick = [case for case in cases if case.get_closest_marker("slow") is None]
    pool = quick or cases
    count = min(mark.args[0], len(pool))
    return [pool[number * len(pool) // count] for number in range(count)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skip what needs expert parallelism where torch is too old for it, on whatever rank."""
    try:
        yield
    except Exception as error:
        if not HAS_PARAMETER_MESHES and any(text in str(error) for text in NEEDS_TORCH_2_12):
            pytest.skip("experts over a mesh of their own need torch 2.12")
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the table of the failures that were tested, as Markdown."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    rows = [value for r in reports for key, value in r.user_properties if key == "failure"]
    if not rows:
        return
    terminalreporter.section("failures on a real Slurm")
    heads = ("case", "what was done", "strategy, launcher", "starts again", "end", "seconds")
    for row in (heads, ["---"] * len(heads), *rows):
        terminalreporter.write_line(f"| {' | '.join(row)} |")


def make_corpus(folder: Path, documents: int = 60, words: int = 200) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    for number in range(documents):
        text = " ".join(draw.choices(WORDS, k=words))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory: vocabulary 300, sequences of 64 tokens."""
    root = tmp_path_factory.mktemp("prepared")
    corpus = make_corpus(root / "corpus")
    config = PrepareConfig(
        sources=[f"{corpus}/*.txt"],
        output=str(root / "shards"),
        tokenizer=TokenizerConfig(vocab_size=300),
        seq_len=64,
        sequences_per_sample=8,
        samples_per_shard=4,
        valid_fraction=0.2,
        num_workers=1,
    )
    prepare(config, progress=False)
    return root / "shards"


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checkout, whose data/ may have anything or nothing."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let nothing that is compiled count for another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_lock_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up a locked run at once."""
    monkeypatch.setattr("modtrain.training.run_directory._LOCK_TIMEOUT", 0.0)


@pytest.fixture
def no_stop_request() -> Iterator[None]:
    """Let a run in this process begin as if alone in it, and leave no handler behind."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    STOP.signum = None
    yield
    STOP.signum = None
    for signum, handler in before.items():
        signal.signal(signum, handler)


def fork_modtrain(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    """Start the command line in a process of its own, without the imports."""
    from modtrain.cli.main import main

    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: sys.exit(main(arguments)))
    process.start()
    return process


def modtrain_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "modtrain", *arguments]


def run_modtrain(*arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        modtrain_command(*arguments),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )


@pytest.fixture(scope="session")
def tiny(prepared: Path) -> list[str]:
    """Overrides of a run that takes a second: 12 steps of 256 tokens."""
    return [
        *("model=tiny", f"data.path={prepared}", "budget.steps=12", "batch.tokens=256"),
        *("batch.micro_batch_size=2", "checkpoint.every=4", "eval.every=6", "eval.sequences=8"),
        *("log.every=2", "strategy.num_threads=1", "strategy.accelerator=cpu"),
    ]


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, without a window."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium, which .ci/run installs")
    # A second to import, which the other tests need not wait.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox does not start as root, and the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
