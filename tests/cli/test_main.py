"""The command line: help, mistakes, and what the verbs print."""

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modtrain.cli import doctor
from modtrain.cli import main as cli
from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.training.plan import resolve
from tests.conftest import make_corpus, modtrain_command, run_modtrain
from tests.helpers.problems import problems_of

pytestmark = pytest.mark.usefixtures("empty_cwd")


def errors(*overrides, verb="train"):
    return problems_of(lambda: resolve(compose(verb, overrides)))


def test_help_and_mistakes_load_nothing_heavy(tmp_path):
    heavy = "torch", "lightning", "numpy", "hydra", "webdataset"
    code = (
        "import sys\nfrom modtrain.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(verb in done.stdout for verb in ("prepare", "train", "eval", "plan", "doctor"))


def test_a_wrong_configuration_needs_no_torch(tmp_path):
    code = (
        "import sys\nfrom modtrain.cli.main import main\n"
        "print(main(['train', 'model.capacity=0', 'budget.steps=1']), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["2", "False"]


def test_every_mistake_is_reported_at_once_with_exit_code_2_and_no_traceback(prepared, tmp_path):
    done = run_modtrain(
        *("train", "model=tiny", f"data.path={prepared}", "model.capacity=1.3"),
        *("model.num_heads=3", "data.seq_len=128", "budget.steps=1", "budget.tokens=5"),
        *("modle.d_model=3", "batch.tokens=many", "schedule=cosin", "optimizer.lr=-1", "x=["),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in (
        *("model.capacity=1.3", "model.num_heads=3", "data.seq_len=128", "budget="),
        *("modle.d_model=3", "did you mean model.d_model?", "batch.tokens=many"),
        *("schedule=cosin", "did you mean cosine?", "optimizer.lr=-1", "x=["),
    ):
        assert text in done.stderr, text
    assert done.stderr.count("remedy:") == 9


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["model.num_heads=3", "model=tiny"], "model.num_heads", 3),
        (["budget.flops=0"], "budget.flops", 0),
        (["budget.flops=inf"], "budget.flops", None),
        ([], "budget", None),
        (["budget.steps=1", "budget.flops=1"], "budget", None),
        (["optimizer.beta2=1"], "optimizer.beta2", 1),
        (["schedule.warmup=2"], "schedule.warmup", 2),
        (["strategy.name=magic"], "strategy.name", "magic"),
        (["precision=fp8"], "precision", "fp8"),
        (["checkpoint.keep_every=7", "checkpoint.every=5"], "checkpoint.keep_every", 7),
        (["name=../up"], "name", "../up"),
        (["seed=-1"], "seed", -1),
        (["data.num_workers=-1"], "data.num_workers", -1),
    ],
)
def test_each_mistake_names_key_value_and_remedy(prepared, overrides, key, value):
    problems = errors(f"data.path={prepared}", *overrides)
    assert key in problems
    assert problems[key].remedy
    if value is not None:
        assert problems[key].value == value


def test_missing_data_names_the_prepare_command(tmp_path):
    done = run_modtrain("train", "name=x", "budget.steps=1", cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert "modtrain prepare" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@given(
    st.lists(
        st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=20), max_size=4
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_override_gives_a_traceback(overrides):
    try:
        compose("train", overrides)
    except ConfigError as error:
        assert error.problems


@pytest.mark.parametrize("override", ["=0", "+=1", "~", ""])
def test_an_override_without_a_key_is_reported(override):
    with pytest.raises(ConfigError, match="has no key"):
        compose("train", [override])


@pytest.mark.parametrize("verb", ["train", "compare", "search", "isoflop", "eval", "submit"])
@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_plus_adds_no_key_that_nothing_reads(verb, plus):
    section = {"eval": "inference", "submit": "cluster"}.get(verb, "optimizer")
    problems = errors(f"{plus}{section}.lrr=5", f"{plus}x.y=1", verb=verb)
    for key in (f"{section}.lrr", "x.y"):
        assert problems[key].reason == "is not a key of this configuration"
    assert verb in ("eval", "submit") or "optimizer.lr?" in problems["optimizer.lrr"].remedy


def test_a_key_that_cannot_be_removed_or_is_of_hydra_is_reported():
    assert errors("~optimizer.lr")["optimizer.lr"].reason == "cannot be removed"
    assert errors("~optimizer.lrr")["optimizer.lrr"].remedy == "did you mean optimizer.lr?"
    assert "train -m" in errors("+hydra.x=1", verb="plan")["+hydra.x"].remedy


def test_overrides_that_clash_with_each_other_are_reported_without_a_traceback():
    with pytest.raises(ConfigError):
        compose("train", ["+experiment=quickstart", "experiment=quickstart"])


@pytest.mark.slow
def test_ctrl_c_in_prepare_is_reported_in_a_line_and_resumed(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", documents=1500, words=2000)
    command = [
        *("prepare", "corpus=files", f"sources=[{corpus}/*.txt]", "output=out", "seq_len=64"),
        *("tokenizer.vocab_size=300", "valid_fraction=0.2", "num_workers=2"),
    ]
    with subprocess.Popen(
        modtrain_command(*command),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not (tmp_path / "out/.work").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        shown = process.stderr.read()
        assert process.wait() == 130
    assert "the same command resumes" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out/index.json").exists()
    assert run_modtrain(*command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out/index.json").exists()


@pytest.mark.parametrize("name", ["mine", "a b", "a,b", "a[1]", "a=b"])
def test_a_users_own_directory_of_configurations_is_searched(name, tmp_path):
    (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / name / "model/mine.yaml").write_text("defaults: [tiny]\nnum_layers: 6\n")
    config = compose("train", ["model=mine"], str(tmp_path / name))
    assert (config.model.num_layers, config.model.d_model) == (6, 32)
    with pytest.raises(ConfigError, match="is not a directory"):
        compose("train", [], str(tmp_path / "nowhere"))


def test_a_mistake_in_a_users_file_is_reported_without_a_traceback(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("num_layerz: 6\n")
    with pytest.raises(ConfigError, match="num_layerz"):
        compose("train", ["model=mine"], str(tmp_path))


@pytest.mark.parametrize(
    ("verb", "file", "content", "text"),
    [
        ("submit", "cluster/bad", b"partition: x\n gpus: 4\n", "cluster/bad.yaml"),
        ("train", "model/bad", b"d_model:\t64\n", "model/bad.yaml"),
        ("train", "model/bad", b"d_model: 1\nd_model: 2\n", "model/bad.yaml"),
        ("train", "model/bad", b"d_model: \xff\n", "invalid start byte"),
    ],
)
def test_a_users_file_that_is_no_yaml_is_reported(verb, file, content, text, tmp_path):
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    (problem,) = problems_of(compose, verb, [file.replace("/", "=")], str(tmp_path)).values()
    assert str(problem.value) == str(tmp_path)
    assert text in problem.reason


@pytest.mark.parametrize(
    ("verb", "override", "read"),
    [
        ("train", "name=2026_11_23", "20261123"),
        ("train", "name=1e5", "100000.0"),
        ("train", "++name=true", "True"),
        ("train", "data.path=1_0", "10"),
        ("eval", "run=1.50", "1.5"),
        ("search", "study=1_2", "12"),
        ("status", "sweep=1_2", "12"),
        ("logs", "job=123_4", "1234"),
        ("submit", "+cluster.environment.DEBUG=true", "True"),
    ],
)
def test_a_text_that_would_be_read_as_a_number_is_reported(verb, override, read):
    key, _, text = override.partition("=")
    problem = errors(override, verb=verb)[key.lstrip("+")]
    assert problem.value == text
    assert problem.reason == f"would be read as {read}"
    assert problem.remedy == f"write '{key}=\"{text}\"'"


@pytest.mark.parametrize("given", ["123", "0123", "No", "inf", '"1e5"', "a_1"])
def test_a_name_is_what_was_written(given):
    assert compose("status", [f"run={given}"]).run == given.strip('"')


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("run=swept/a=0.125", "run", "'run=\"swept/a=0.125\"'"),
        ('run=say "it"', "run", '\'run="say \\"it\\""\''),
        ("run=[", "run", "'run=\"[\"'"),
    ],
)
def test_what_is_not_understood_is_reported_with_a_form_that_works(override, key, remedy):
    problem = errors(override, verb="eval")[key]
    assert not problem.reason.endswith(("None", ": "))
    assert problem.remedy.endswith(remedy)
    (word,) = shlex.split(remedy)
    assert compose("eval", [word]).run


@pytest.mark.parametrize("choice", ["1e5", "3", "{a: 1}"])
def test_a_choice_that_is_no_text_does_not_exist(choice):
    assert errors(f"model={choice}")["model"].reason == "does not exist"


def test_plan_prints_parts_and_schedule_and_the_conventions_when_asked(capsys):
    words = ["model=mod_60m", "data.seq_len=2048", "budget.flops=6e18"]
    assert cli.main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "backward = 2 x" not in shown
    assert cli.main(["plan", *words, "--conventions"]) == 0
    assert capsys.readouterr().out.startswith(shown.rpartition("what counts")[0])
    assert cli.main(["plan", *words, "conventions=true"]) == 0
    shown = capsys.readouterr().out
    for text in (
        *("attention products", "router", "predictor", "head", "if dense", "backward = 2 x"),
        *("steps", "tokens", "cosine", "AdamW moments", "causal attention is counted in full"),
    ):
        assert text in shown


def test_a_plan_that_does_not_fit_the_prepared_data_warns(prepared, capsys):
    """For other values than those of the data, as if there were none; train refuses them."""
    words = ["model=mod_60m", "model.vocab_size=299", "budget.flops=6e18"]
    words += ["data.seq_len=2048", "data.document_mask=true", "data.eos_id=7"]
    assert cli.main(["plan", *words]) == 0
    without = capsys.readouterr()
    assert without.err == ""
    words.append(f"data.path={prepared}")
    assert cli.main(["plan", *words]) == 0
    beside = capsys.readouterr()
    assert beside.out == without.out
    assert f"warning: the prepared data in {prepared}" in beside.err
    texts = ("data.seq_len=2048", "length 64", "data.eos_id=7", "model.vocab_size=299", "300")
    assert all(text in beside.err for text in texts)
    assert beside.err.count("remedy:") == 3
    assert cli.main(["train", "name=x", *words]) == 2
    refused = capsys.readouterr().err
    assert all(text in refused for text in texts)
    # What is left open comes from the data.
    assert cli.main(["plan", "model=tiny", f"data.path={prepared}", "budget.steps=12"]) == 0
    fitting = capsys.readouterr()
    assert "sequences of 64 tokens" in fitting.out
    assert fitting.err == ""


def test_an_index_that_cannot_be_read_is_warned_of_too(prepared, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    index = json.loads((prepared / "index.json").read_text()) | {"version": 0}
    (tmp_path / "old/index.json").write_text(json.dumps(index))
    words = ["model=mod_60m", "data.seq_len=2048", "data.path=old", "budget.flops=6e18"]
    assert cli.main(["plan", *words]) == 0
    assert "data.path=old" in capsys.readouterr().err


def test_a_mistake_in_a_plan_is_reported_without_what_it_does_not_need(prepared, capsys):
    words = ["data.seq_len=2048", f"data.path={prepared}", "budget.steps=1", "budget.stesp=1"]
    assert cli.main(["plan", *words]) == 2
    assert capsys.readouterr().err.count("remedy:") == 1


def test_doctor_lists_what_is_installed(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for text in ("torch", "lightning", "gloo", "disk", "shared memory", "Slurm", "CUDA"):
        assert text in shown
    assert cli.main(["doctor", "model=tiny"]) == 2


def test_doctor_prints_nothing_that_a_package_prints_when_it_is_imported(
    tmp_path, monkeypatch, capsys
):
    noise = "import logging, sys, warnings\nprint('noise')\nprint('noise', file=sys.stderr)\n"
    noise += "warnings.warn('noise')\nlogging.getLogger('a').warning('noise')\n"
    (tmp_path / "noisy.py").write_text(noise)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "_PACKAGES", ("noisy",))
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1")
    assert cli.main(["doctor", "require=[packages]"]) == 0
    shown = capsys.readouterr()
    assert "noisy" in shown.out
    assert "noise" not in shown.out + shown.err
    (tmp_path / "noisy.py").write_text("raise OSError('it is broken')")
    monkeypatch.delitem(sys.modules, "noisy")
    importlib.invalidate_caches()
    assert cli.main(["doctor", "require=[packages]"]) == 1
    assert "it is broken" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_after_training_labels_causal_and_not(tiny, prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *tiny, "name=a"]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "run=a", "sequences=8", "batch_size=4"]) == 0
    shown = capsys.readouterr().out
    for text in ("causal loss", "top-k loss, not causal", "bits a byte", "balanced accuracy"):
        assert text in shown
    (file,) = (tmp_path / "runs/a").glob("eval-*.json")
    figures = json.loads(file.read_text())
    result = json.loads((tmp_path / "runs/a/result.json").read_text())
    assert figures["causal_loss"] == pytest.approx(result["held_out/causal_loss"], rel=1e-5)
    assert cli.main(["eval", "run=nobody"]) == 1
    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert cli.main(["eval", "run=a", f"accelerator={absent}"]) == 2
    assert cli.main(["train", *tiny, "name=b", f"strategy.accelerator={absent}"]) == 2
    assert not (tmp_path / "runs/b").exists()
    (tmp_path / "a file").touch()
    assert cli.main(["train", *tiny, "name=b", "runs_dir=a file"]) == 1
    manifest = tmp_path / "runs/a/manifest.json"
    whole = manifest.read_text()
    fingerprint = json.loads(whole)["data_fingerprint"]
    manifest.write_text(whole.replace(fingerprint, "0" * 64))
    assert cli.main(["eval", "run=a"]) == 1
    assert "other data now" in capsys.readouterr().err
    manifest.write_text(whole)
    assert cli.main(["eval", "run=a", "step=5"]) == 1
    assert "there are: 8, 12" in capsys.readouterr().err
    assert cli.main(["eval"]) == 2
