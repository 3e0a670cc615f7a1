"""Every command that the documents show runs, and every link and file that they name is there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.ranks import CONTEXT

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs/extensions"))
import config_reference  # noqa: E402

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What runs for minutes has a test of its own, and the tests cannot run themselves.
STUDY_TEST = "tests/experiments/compare/test_study.py"

ELSEWHERE = {
    "make quickstart": "tests/test_quickstart.py",
    "make test": ".ci/run",
    "make test-slow": ".ci/run",
    "make lint": ".ci/run",
    "make types": ".ci/run",
    "make imports": ".ci/run",
    "make docs": ".ci/run",
    "make install": ".ci/run",
    ".venv/bin/modtrain compare experiment=study": STUDY_TEST,
    ".venv/bin/modtrain compare experiment=study only=[moe]": STUDY_TEST,
    ".venv/bin/modtrain compare experiment=study train=false timed_rounds=0": STUDY_TEST,
}


def commands(document: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", document.read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a user has it after `make install`: the environment and the checkout's files."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in {".venv", "data", "runs"}:
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(sys.prefix)
    printed = folder / "prepared"
    # What `make quickstart` has made ready before a reader comes to any other command.
    assert run_forked(run_main, ["prepare", "corpus=sotu"], folder, printed) == 0, printed
    return folder


def run_main(words: list[str], workplace: Path, printed: Path) -> None:
    """Run `modtrain` with ``words`` in a process forked from a warm interpreter."""
    from modtrain.cli.main import main

    _enter(workplace, printed)
    sys.exit(main(words))


def run_python(source: str, workplace: Path, printed: Path) -> None:
    _enter(workplace, printed)
    exec(compile(source, "<document>", "exec"), {"__name__": "__main__"})


def _enter(workplace: Path, printed: Path) -> None:
    os.chdir(workplace)
    output = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)


def run_forked(function, what, workplace, printed) -> int:
    child = CONTEXT.Process(target=function, args=(what, workplace, printed))
    child.start()
    child.join(240)
    if child.is_alive():
        child.kill()
    child.join()
    return child.exitcode


def run_command(command: str, workplace: Path, printed: Path) -> int:
    """Return the exit code; modtrain itself runs without the seconds that its imports take."""
    if command.startswith(".venv/bin/modtrain ") and not re.search(r"[|&><]|\$'", command):
        return run_forked(run_main, shlex.split(command)[1:], workplace, printed)
    with printed.open("w") as output:
        done = subprocess.run(
            command,
            shell=True,
            cwd=workplace,
            stdout=output,
            stderr=output,
            timeout=240,
            env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
            check=False,
        )
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_run(document, workplace, tmp_path):
    printed = tmp_path / "printed"
    for command in commands(document):
        if command in ELSEWHERE:
            assert command in (ROOT / ELSEWHERE[command]).read_text()
            continue
        code = run_command(command, workplace, printed)
        assert code == 0, f"{command}\n{printed.read_text()}"
    for source in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL):
        assert run_forked(run_python, source, workplace, printed) == 0, printed.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_keys_are_keys(document):
    keys = {
        key.name
        for verb in config_reference.SCHEMAS
        for section in config_reference.sections(verb)
        for key in section.keys
    }
    heads = {key.partition(".")[0] for key in keys if "." in key}
    named = rf"(?<![\w./-])((?:{'|'.join(heads)})(?:\.[a-z]\w*)+)(?![\w./*(])"
    text = re.sub(r"\]\([^)]*\)|https?://\S+", "", document.read_text())
    open_ended = ("cluster.environment.", "model.capacity_")
    for key in re.findall(named, text):
        is_part = any(other.startswith(f"{key}.") for other in keys)
        is_file = key.endswith((".json", ".model", ".py", ".sbatch", ".sh", ".yaml"))
        assert key in keys or is_part or is_file or key.startswith(open_ended), key


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_links_to_elsewhere_are_well_formed(document):
    """Nothing is asked of the network: the address alone, and the form of arXiv's numbers."""
    for address in re.findall(r"\]\((\w+:[^)]*)\)|<(https?:[^>]*)>", document.read_text()):
        parts = urlsplit(address[0] or address[1])
        assert parts.scheme in ("http", "https"), address
        assert re.fullmatch(r"[\w.-]+(:\d+)?", parts.netloc), address
        if parts.netloc == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", parts.path), address


def test_every_verb_is_shown():
    from modtrain.cli.main import _VERBS

    shown = " ".join(line for document in DOCUMENTS for line in commands(document))
    assert [verb for verb in _VERBS if f"modtrain {verb}" not in shown] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_it_names_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("<"):
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:modtrain|conf|tests|benchmarks|docs)/[\w./*-]+)`", text):
        assert list(ROOT.glob(path)), path


def test_a_key_without_a_meaning_fails_the_build(monkeypatch):
    from dataclasses import dataclass

    @dataclass
    class Extended:
        """Two keys. first: what the first one means."""

        first: int = 0
        second: int | None = None

    from modtrain.cli import key_reference

    monkeypatch.setitem(config_reference.SCHEMAS, "extended", Extended)
    monkeypatch.setattr(key_reference, "compose", lambda verb, overrides: Extended())
    with pytest.raises(ValueError, match=r"Extended.*'second'"):
        config_reference.sections("extended")


def test_the_reference_has_every_key_of_every_verb():
    text = config_reference.fill((ROOT / "docs/reference/configuration.md").read_text())
    for verb in config_reference.SCHEMAS:
        if verb != "plan":  # it has train's
            for section in config_reference.sections(verb):
                assert all(f"`{key.name}`" in text for key in section.keys), verb
    assert ": how many of the newest stay." in text
    assert "`checkpoint.keep_last`]{#train-checkpoint-keep_last} · int · default `2`" in text
