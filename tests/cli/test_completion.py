"""What a shell offers behind `modtrain …`, and how fast."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import modtrain
from modtrain.cli.completion import SHELLS, _keys, candidates, shell_code
from modtrain.cli.key_reference import sections
from modtrain.cli.main import _VERBS
from modtrain.cli.schemas import VERBS, schema_of
from modtrain.common.errors import ConfigError

ROOT = Path(modtrain.__file__).parents[1]


def offered(line):
    *words, current = line.split(" ")
    return candidates(words, current, _VERBS)


@pytest.fixture
def run_names(tmp_path, monkeypatch):
    for name in ("first", "sweep/a=1", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "tuned.yaml").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("run_names")
@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("", ["train", "search-patterns", "completion", "help"], ["model="]),
        ("se", ["search", "search-patterns"], ["train"]),
        (
            "train ",
            ["model=", "model.", "budget.", "name=", "launch=local"],
            ["budget.flops=", "run="],
        ),
        ("train name=a --dry-run model=t", ["model=tiny"], ["model=quickstart"]),
        ("train budg", ["budget.flops=", "budget.epochs="], ["budget."]),
        ("train model.router.gate_", ["model.router.gate_scale="], ["model.router.gate="]),
        ("train model.router", ["model.router.gate="], []),
        ("train compile=", ["compile=true", "compile=false"], []),
        ("train from=", ["from=first", "from=other"], []),
        ("eval run=f", ["run=first"], ["run=other"]),
        ("eval runs_dir=runs run=sw", ["run=sweep/a=1"], []),
        ("eval runs_dir=elsewhere run=", [], ["run=first"]),
        ("eval strat", [], ["strategy="]),
        ("plan ", ["model="], ["launch=local"]),
        ("submit ", ["train", "eval"], ["generate"]),
        ("submit train n", ["nodes=", "name="], []),
        ("config train model=", ["model=tiny"], []),
        ("--config-dir mine train model=tu", ["model=tuned"], []),
        ("prepare output=ru", ["output=runs/"], []),
        ("train --d", ["--dry-run"], ["--plan"]),
        ("completion ", list(SHELLS), []),
        ("nonsense mo", [], ["model="]),
    ],
)
def test_words_are_offered(line, some, none):
    words = offered(line)
    assert set(some) <= set(words)
    assert not set(none) & set(words)
    assert all(word.startswith(line.split(" ")[-1]) for word in words)


@pytest.mark.parametrize("verb", ["train", "eval", "submit", "prepare"])
def test_the_keys_are_those_that_help_lists(verb):
    listed = {key.name for section in sections(verb) for key in section.keys}
    assert {name for name, _ in _keys(schema_of(verb), "")} == listed


def test_every_verb_with_keys_has_a_schema():
    assert set(VERBS) == set(_VERBS) - {"config", "completion", "doctor"}


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match=r"powershell(.|\n)*bash\|zsh\|fish"):
        shell_code(["powershell"])
    assert "modtrain" in shell_code(["bash"])


def test_completion_loads_little():
    heavy = ("torch", "lightning", "hydra", "omegaconf", "numpy", "pandas")
    code = (
        "import sys; from modtrain.cli.completion import candidates\n"
        "assert candidates(['train'], 'budget.', ['train'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


class Shell:
    """An interactive shell in a terminal of its own, with modtrain's completion."""

    def __init__(self, name, folder):
        program = folder / "bin" / "modtrain"
        program.parent.mkdir()
        # What is run without a question of the shell leaves its words.
        program.write_text(
            '#!/bin/sh\nif [ -z "$_ARGCOMPLETE" ] && [ "$1" != completion ]; then'
            f' echo "$@" > {folder}/typed; exit; fi\nexec {sys.executable} -m modtrain "$@"\n'
        )
        program.chmod(0o755)
        start = {
            "bash": ("bash", "--norc", "--noprofile", "-i"),
            "zsh": ("zsh", "-f", "-i"),
            "fish": ("fish", "--no-config", "-i"),
        }[name]
        environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            "HOME": str(folder),
        }
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(start[0], start, environment)
        self.type(
            {
                "bash": 'eval "$(modtrain completion bash)"; echo rea""dy\n',
                "zsh": 'autoload -U compinit; compinit -u; eval "$(modtrain completion zsh)"; '
                'echo rea""dy\n',
                "fish": 'modtrain completion fish | source; echo rea""dy\n',
            }[name]
        )
        self.wait_for("ready\r")

    def type(self, text):
        os.write(self.terminal, text.encode())

    def read(self):
        if not select.select([self.terminal], [], [], 0.2)[0]:
            return ""
        return os.read(self.terminal, 1 << 16).decode(errors="replace")

    def wait_for(self, text, seconds=120):
        output, deadline = "", time.monotonic() + seconds
        while text not in output:
            assert time.monotonic() < deadline, output
            output += self.read()

    def close(self):
        os.kill(self.pid, signal.SIGHUP)
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("run_names")
@pytest.mark.on_commit("bash")
@pytest.mark.parametrize("name", SHELLS)
def test_a_real_shell_completes(name, tmp_path):
    if shutil.which(name) is None:
        pytest.skip(f"needs {name}")
    shell, typed = Shell(name, tmp_path), tmp_path / "typed"
    try:
        shell.type("modtrain trai\tmodel=ti\tbudget.to\t1e5 from=fi\t\n")
        deadline = time.monotonic() + 120
        while not typed.exists() or not typed.read_text().endswith("\n"):
            assert time.monotonic() < deadline
            shell.read()
    finally:
        shell.close()
    assert typed.read_text().split() == ["train", "model=tiny", "budget.tokens=1e5", "from=first"]
