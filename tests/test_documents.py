"""Every command that the documents show runs, and every link and file that they name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_run(document, workplace):
    for command in commands(document):
        if command in ELSEWHERE:
            assert command in (ROOT / ELSEWHERE[command]).read_text()
            continue
        done = subprocess.run(
            command,
            shell=True,
            cwd=workplace,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_verb_is_shown():
    from modtrain.cli.main import _VERBS

    shown = " ".join(line for document in DOCUMENTS for line in commands(document))
    assert [verb for verb in _VERBS if f"modtrain {verb}" not in shown] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_it_names_are_there(document):
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

    monkeypatch.setitem(config_reference.SCHEMAS, "extended", Extended)
    monkeypatch.setattr(config_reference, "compose", lambda verb, overrides: Extended())
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
