"""The files of docker/ agree and parse, and their steps make an environment that works.

No container engine is needed: the slow tests run the steps of `docker/install.sh` by themselves.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import modtrain
from modtrain.cli import doctor
from modtrain.cli import main as cli
from modtrain.cli.compose import compose

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DEFINITION = (DOCKER / "modtrain.def").read_text()
RECIPE = DOCKER / "install.sh"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGE = (ROOT / "docs/how-to/use-containers.md").read_text()
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's keywords with what follows them, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each named stage's instructions, those of the stages that it is made from first."""
    by_name: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for keyword, rest in instructions():
        if keyword == "FROM":
            base, *name = rest.split(" AS ")
            assert base in by_name or base == "${PYTHON_IMAGE}", base
            current = list(by_name.get(base, []))
            by_name[name[0] if name else ""] = current
        else:
            current.append((keyword, rest))
    return by_name


def sections() -> dict[str, str]:
    """The definition's sections, with the defaults of its arguments put in."""
    _, *parts = re.split(r"^%(\w+)\n", DEFINITION, flags=re.MULTILINE)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    given = dict(line.strip().split("=", 1) for line in texts["arguments"].splitlines() if line)
    asked = set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION))
    assert asked == set(given), "an argument without a default, or one that is not used"
    return {
        name: re.sub(r"\{\{ (\w+) \}\}", lambda match: given[match[1]], text)
        for name, text in texts.items()
    }


def copied(stage: str = "build-cuda") -> set[str]:
    """What a stage of the Dockerfile takes out of the build's context."""
    paths = set()
    for keyword, rest in stages()[stage]:
        if keyword == "COPY" and "--from=" not in rest:
            *sources, target = rest.split()
            # A file goes into a target that ends with a slash; of a folder, what is in it does.
            into = {s for s in sources if target.endswith("/") and (ROOT / s).is_file()}
            places = [f"{target}{Path(s).name}" if s in into else target for s in sources]
            assert places == [f"/src/{source}" for source in sources]
            paths.update(sources)
    return paths


def pins(*paths: Path) -> dict[str, Version]:
    lines = [line for path in paths for line in path.read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line.strip() and not line.startswith("#")]
    names = [canonical(name) for name, _ in pairs]
    assert len(set(names)) == len(names), "pinned twice"
    return {canonical(name): Version(version) for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, Version]:
    return pins(ROOT / "constraints.txt", DOCKER / "constraints.txt")


def let_through(paths: list[str]) -> set[str]:
    """Those of ``paths`` that .dockerignore leaves in: the last rule that matches decides.

    A rule for a folder holds for what is in it (docs.docker.com, "Build context").
    """

    def expression(pattern: str) -> re.Pattern[str]:
        pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
        wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        parts = [wild.get(p) or (p if p.startswith("[") else re.escape(p)) for p in pieces]
        return re.compile("".join(parts))

    lines = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    rules = [(line.startswith("!"), expression(line.lstrip("!"))) for line in lines]
    kept = set()
    for path in paths:
        names = path.split("/")
        above = ["/".join(names[: n + 1]) for n in range(len(names))]
        verdicts = [keep for keep, rule in rules if any(rule.fullmatch(part) for part in above)]
        if not verdicts or verdicts[-1]:
            kept.add(path)
    return kept


def checkout() -> list[str]:
    """The files of the checkout, without its hidden folders."""
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    return [p.relative_to(ROOT).as_posix() for p in files]


def tool(name: str) -> str:
    """A linter of the `dev` extra: one that is missing fails the test."""
    program = shutil.which(name, path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert program, f"{name} is missing: pip install -c constraints.txt -e '.[dev]'"
    return program


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def test_the_linters_find_nothing(tmp_path):
    run(tool("hadolint"), "--no-color", DOCKER / "Dockerfile")
    run(tool("shellcheck"), RECIPE, DOCKER / "build.sh")
    for name in ("post", "environment", "runscript", "test"):
        script = tmp_path / name
        script.write_text(sections()[name])
        # Compared are arguments of the build, which stand here with their defaults.
        run(tool("shellcheck"), "--shell=sh", "--exclude=SC2050,SC2194", script)


def test_the_build_gets_what_it_copies_and_nothing_else():
    context = let_through(checkout())
    assert copied("build-cpu") == copied("build-cuda")
    assert set(re.findall(r"--mount=type=bind,source=([^,\s]+)", DOCKERFILE)) <= copied()
    for source in copied():
        assert (ROOT / source).exists(), source
    of = {source: {f for f in context if f"{f}/".startswith(f"{source}/")} for source in copied()}
    assert all(of.values()), of
    assert set().union(*of.values()) == context
    code = {p.relative_to(ROOT).as_posix() for p in (ROOT / "modtrain").rglob("*.py")}
    assert code <= context
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {*wheel, PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= copied()


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", ".env", "docker/.env", "modtrain/.env"),
        *("runs/first/checkpoints/1", "data/sotu/train.tar", "conf/.netrc", "notes.txt"),
        *("modtrain/__pycache__/cli.pyc", "modtrain/data/__pycache__/order.pyc", "tests/x.py"),
        *("docker/compose.yaml", "modtrain.sif", "constraints.txt.orig", "id_rsa"),
    ],
)
def test_nothing_secret_or_big_enters_the_build(path):
    assert let_through([path, "modtrain/data/stream/order.py"]) == {"modtrain/data/stream/order.py"}


def test_the_definition_takes_the_same_files_to_the_same_places():
    pairs = [line.split() for line in sections()["files"].splitlines() if line.strip()]
    assert dict(pairs) == {source: f"/src/{source}" for source in copied()}


def test_python_is_one_version():
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert f"PYTHON_IMAGE={image}\n" in sections()["arguments"]
    assert set(re.findall(r"python:[\w.-]+\w", PAGE)) == {image}
    # A tag that names version, variant and Debian's release.
    version = re.fullmatch(r"python:(3\.11)\.\d+-slim-bookworm", image)[1]
    assert PROJECT["project"]["requires-python"] == f">={version}"
    assert PROJECT["tool"]["mypy"]["python_version"] == version
    assert f"PYTHON=${{PYTHON:-python{version}}}" in RECIPE.read_text()


def test_versions_are_those_of_the_lock_files():
    needed = PROJECT["project"]
    for line in [*needed["dependencies"], *needed["optional-dependencies"]["corpus"]]:
        requirement = Requirement(line)
        assert locked()[canonical(requirement.name)] in requirement.specifier, line
    label = f'org.opencontainers.image.version="{modtrain.__version__}"'
    assert label in DOCKERFILE
    assert label.replace("=", " ").replace('"', "") in sections()["labels"]
    cuda = ".".join(str(part) for part in locked()["nvidia-cuda-runtime"].release[:2])
    assert f"CUDA {cuda}" in PAGE
    # Everywhere else it is found, and not written.
    for path in (DOCKER / "Dockerfile", DOCKER / "modtrain.def", DOCKER / "build.sh"):
        assert f"cuda>={cuda}" not in path.read_text()


def test_labels_are_those_of_the_project():
    labels = dict(re.findall(r'image\.(\w+)="([^"]*)"', DOCKERFILE))
    lines = [line.split(maxsplit=1) for line in sections()["labels"].strip().splitlines()]
    assert labels["licenses"] == PROJECT["project"]["license"]
    shown = {key.rsplit(".", 1)[1]: value for key, value in lines}
    assert labels | {"revision": "unknown"} == shown


def steps(text: str) -> list[list[str]]:
    text = text.replace("\\\n", " ")
    calls = re.findall(r"bash (?:\S+/install\.sh|\$install) ([^\n;&)]+)", text)
    return [shlex.split(line.replace("{{ TARGET }}", "cuda")) for line in calls]


def test_both_builders_take_steps_that_the_recipe_has():
    """A step is named with the number of its arguments, itself counted."""
    recipe = RECIPE.read_text()
    has = dict(re.findall(r'"(\w+) (\d)"', recipe))
    for name in has:
        assert re.search(rf"^{name}\(\) \{{", recipe, flags=re.MULTILINE), name
        assert f"#   install.sh {name}" in recipe
    for step in [*steps(DOCKERFILE), *steps(DEFINITION)]:
        assert has.get(step[0]) == str(len(step)), step
    # Docker's variables are given from outside, and Apptainer runs as the user who starts it.
    assert {step[0] for step in steps(DOCKERFILE)} == set(has) - {"cuda_version"}
    assert {step[0] for step in steps(DEFINITION)} == set(has) - {"user"}
    wrong = subprocess.run(["bash", RECIPE, "code", "x"], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_each_target_runs_without_root_and_has_a_health_check():
    for name in ("cpu", "cpu-compile", "cuda", "cuda-compile", ""):
        last = dict(stages()[name])
        assert last["USER"] == "1000:1000"
        assert last["ENTRYPOINT"] == '["modtrain"]'
        rest = "\n".join(text for _, text in stages()[name])
        needs = set(re.search(r"require=\[([\w,]+)\]", last["HEALTHCHECK"])[1].split(","))
        assert {"packages", "corpus"} <= needs
        assert ("compiler" in needs) == ("install.sh compiler" in rest) == ("compile" in name)
        assert ({"cuda", "nccl"} <= needs) == ("cpu" not in name) == ("libraries" in rest)
        assert f"--from=build-{'cpu' if 'cpu' in name else 'cuda'}" in rest
    # PyTorch's index is named once, for where pip has none with the CPU build.
    assert RECIPE.read_text().count(CPU_INDEX) == 1
    assert "download.pytorch.org" not in DOCKERFILE + DEFINITION


def page_commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def shown_commands() -> list[list[str]]:
    """What follows `modtrain` wherever docker/ or the page gives a verb."""
    commands = [
        service["command"] for name, service in COMPOSE["services"].items() if "train" in name
    ]
    for words in [*page_commands(), *map(shlex.split, sections()["help"].splitlines()[2:6])]:
        for place, word in enumerate(words):
            image = word.startswith("modtrain:") or word.endswith(".sif")
            service = word == "train" and words[place - 2 : place] == ["run", "--rm"]
            if (image or service) and words[place + 1 :] and "build" not in words:
                commands.append(words[place + 1 :])
    for line in [*sections()["test"].splitlines(), *re.findall(r"`(modtrain [^`]+)`", PAGE)]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["modtrain"] and len(words) > 1:
            commands.append(words[1:])
    for keyword, rest in instructions():
        if keyword == "HEALTHCHECK":
            commands.append(yaml.safe_load(rest.split("CMD")[1])[1:])
    return commands


def test_every_command_parses(monkeypatch):
    asked = []
    monkeypatch.setattr("modtrain.cli.doctor.show", lambda require=(): asked.extend(require) or 0)
    commands = shown_commands()
    assert len(commands) >= 15
    for verb, *overrides in {tuple(command) for command in commands}:
        # What only stands for more.
        given = [o for o in overrides if o != "..." and "…" not in o and "$" not in o]
        assert verb in cli._VERBS, verb
        if verb == "doctor":
            assert cli.main(["doctor", *given]) == 0
        else:
            compose(verb, given)
    assert set(asked) >= {"packages", "corpus", "cuda", "nccl", "compiler"}
    assert set(asked) <= set(doctor.NEEDS)
    needs = re.findall(r"needs=(?:\$needs,)?([\w,]+)", sections()["test"])
    assert {need for listed in needs for need in listed.split(",")} <= set(doctor.NEEDS)


@pytest.mark.usefixtures("empty_cwd")
def test_what_runs_by_itself_can_be_planned(prepared):
    from modtrain.training.plan import resolve

    for name in ("train", "train-gpu"):
        verb, *overrides = COMPOSE["services"][name]["command"]
        resolve(compose(verb, [*overrides, f"data.path={prepared}"]))
    (line,) = re.findall(r"modtrain (plan .+)", sections()["test"])
    assert cli.main(line.split()) == 0


def test_the_page_builds_what_there_is():
    build = [words for words in page_commands() if "build" in words]
    assert len(build) == 4
    for words in build:
        given = [words[n + 1].split("=")[0] for n, w in enumerate(words) if w == "--build-arg"]
        if words[0] == "docker":
            assert (ROOT / words[words.index("-f") + 1]).is_file()
            assert words[words.index("--target") + 1] in stages()
            assert all(f"ARG {name}=" in DOCKERFILE for name in given)
        else:
            assert (ROOT / words[-1]).is_file()
            assert all(f"    {name}=" in DEFINITION for name in given)
    table = re.findall(r"^\| `([A-Z_]+)` \|", PAGE, flags=re.MULTILINE)
    arguments = set(re.findall(r"^ARG (\w+)=", DOCKERFILE, flags=re.MULTILINE))
    assert set(table) == arguments
    # The definition takes the same, and has two in the place of targets.
    asked = set(re.findall(r"^    (\w+)=", sections()["arguments"], flags=re.MULTILINE))
    assert asked == arguments | {"TARGET", "COMPILER"}


KEYS = {
    *("user", "init", "image", "build", "shm_size", "stop_grace_period", "volumes", "command"),
    *("profiles", "deploy", "entrypoint", "ports", "healthcheck"),
}


def test_the_services_are_whole():
    """The keys are of the Compose specification; paths, targets and users fit the Dockerfile."""
    services = COMPOSE["services"]
    assert set(services) == {"train", "train-gpu", "tensorboard"}
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services"}
    work = dict(stages()["cpu"])["WORKDIR"]
    for name, service in services.items():
        assert set(service) <= KEYS, name
        context = (DOCKER / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]) == DOCKER / "Dockerfile"
        target = service["build"]["target"]
        assert target in stages()
        assert service["image"] == f"modtrain:{target}"
        assert service["user"] == "${MODTRAIN_UID:-1000}:${MODTRAIN_GID:-1000}"
        for volume in service["volumes"]:
            source = (DOCKER / volume["source"]).resolve()
            assert source in {ROOT / "runs", ROOT / "data"}
            assert volume["target"] == f"{work}/{source.name}"
            assert volume["bind"] == {"create_host_path": False}
    board = services["tensorboard"]
    assert "profiles" not in board
    assert services["train-gpu"]["profiles"] == ["gpu"]
    assert f"--logdir={work}/runs" in board["command"]
    assert [v["target"] for v in board["volumes"]] == [f"{work}/runs"]
    assert all(v["read_only"] for v in board["volumes"])
    (port,) = {re.search(r"=(\d+)", word)[1] for word in board["command"] if "--port" in word}
    assert board["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f":{port}/" in board["healthcheck"]["test"][-1]
    compile(board["healthcheck"]["test"][-1], "healthcheck", "exec")
    assert f"localhost:{port}" in PAGE


def test_doctor_fails_where_what_is_required_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name, **_: None)
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "require=[corpus]"]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", "require=[corpus,compiler]"]) == 1
    output = capsys.readouterr().out
    assert "required, C++ compiler" in output
    assert "required, Slurm" not in output
    assert cli.main(["doctor", "require=slurm"]) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [("require=[cuda,gpu]", "require=gpu"), ("require=3", "require=3"), ("model=tiny", "model")],
)
def test_doctor_reports_requirements_that_it_does_not_know(override, message, capsys):
    assert cli.main(["doctor", override]) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_does_not_import_is_missing(monkeypatch):
    """Its metadata is there, its files are damaged: only an import shows it."""
    monkeypatch.setitem(sys.modules, "sotu", None)
    assert not doctor._package("sotu", imported=False).missing
    broken = doctor._package("sotu", imported=True)
    assert "ImportError" in broken.missing or "ModuleNotFoundError" in broken.missing
    assert broken.need == "corpus"
    asked = []
    monkeypatch.setattr("importlib.import_module", asked.append)
    doctor.show(["packages"])
    assert "hydra" in asked
    assert "deepspeed" in asked
