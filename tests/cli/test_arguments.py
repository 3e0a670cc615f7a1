"""Options, verbs and their mistakes, and what is printed of a configuration."""

import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import yaml

from modtrain.cli import main as cli
from modtrain.cli.arguments import _OTHER_VERBS, _VERB_SENTENCES, make_parser, read_arguments
from modtrain.cli.base_config import expand_base
from modtrain.cli.compose import SCHEMAS, compose
from modtrain.cli.compose_verbs import as_composed
from modtrain.cli.groups import groups_of
from modtrain.cli.verb_help import EXAMPLES, verb_help
from modtrain.common.overrides import parse
from modtrain.experiments.sweep.launch_overrides import LaunchOverrides
from tests.helpers.problems import problems_of

pytestmark = pytest.mark.usefixtures("empty_cwd")

VERBS = {name: description for name, (_, description) in cli._VERBS.items()}


def read(line):
    return read_arguments(shlex.split(line), VERBS)


def printed(*words):
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert cli.main(list(words)) == 0
    return shown.getvalue()


@pytest.mark.parametrize(
    ("line", "key", "remedy"),
    [
        ("trian name=x", "trian", "did you mean train?"),
        ("model=tiny", "model=tiny", "modtrain train model=tiny"),
        ("train --model tiny", "--model", "write model=tiny"),
        ("train --lr=1e-3", "--lr", "write optimizer.lr=1e-3"),
        ("train --max_tokens=1e6", "--max_tokens", "write budget.tokens=1e6"),
        ("generate --max_tokens=9", "--max_tokens", "write max_tokens=9"),
        ("train --output_dir runs", "--output_dir", "write runs_dir=runs"),
        ("submit train --output_dir runs", "--output_dir", "write runs_dir=runs"),
        ("export --output_dir x", "--output_dir", "write output=x"),
        ("eval --ckpt_path first", "--ckpt_path", "write run=first"),
        ("train --wandb", "--wandb", "write log=wandb"),
        ("train --learning-rate 1e-3", "--learning-rate", "write optimizer.lr=1e-3"),
        ("train --trainer.max_steps 10", "--trainer.max_steps", "write budget.steps=10"),
        ("train --logger wandb", "--logger", "write log=wandb"),
        ("train --devices 8", "--devices", "torchrun --nproc-per-node 8"),
        ("generate --prompt 'a b'", "--prompt", """write 'prompt="a b"'"""),
        ("train --config runs/x/config.yaml", "--config", "write from=runs/x/config.yaml"),
        ("train --config-d mine", "--config-d", "did you mean --config-dir?"),
        ("--helpp", "--helpp", "did you mean --help?"),
        ("submit train --dryrun", "--dryrun", "did you mean --dry-run?"),
        ("generate --show", "--show", "did you mean --show-depth?"),
        ("train --optimiser.lr 1", "--optimiser.lr", "did you mean optimizer.lr=1?"),
        ("train --foo 1", "--foo", "modtrain train --help lists the keys"),
        ("train -n x", "-n", "modtrain train --help lists the keys"),
        ("train --experiment pilot", "--experiment", "write experiment=pilot"),
        ("train --from first", "--from", "write from=first"),
        ("compare --arms.a 1", "--arms.a", "write arms.a=1"),
        ("finetune name=x", "finetune", "did you mean train?"),
        ("chat run=x", "chat", "did you mean generate?"),
        ("ls", "ls", "did you mean status?"),
        ("resume name=x", "resume", "modtrain train name=NAME resumes a run"),
        ("version", "version", "modtrain --version"),
        ("train --config-name mine", "--config-name", "experiment=mine"),
        ("train -cn mine", "-cn", "experiment=mine"),
        ("train --config-path=mine", "--config-path", "write --config-dir mine"),
        ("train --info", "--info", "modtrain config VERB"),
        ("train --resolve", "--resolve", "leave it out"),
        ("train --cfg hydra", "--cfg", "write --cfg job"),
        ("train --print_config", "--print_config", "modtrain config VERB"),
    ],
)
def test_a_mistake_is_answered_with_the_form_that_works(line, key, remedy):
    assert remedy in problems_of(read, line)[key].remedy


@pytest.mark.parametrize("table", [_OTHER_VERBS, _VERB_SENTENCES])
def test_other_names_of_verbs_are_no_verbs_and_stand_for_one(table):
    assert not set(table) & set(VERBS)
    assert set(_OTHER_VERBS.values()) <= set(VERBS)


def test_every_mistake_of_a_command_line_is_reported_at_once(capsys):
    assert cli.main(["trian", "--model", "tiny", "--foo=1"]) == 2
    assert capsys.readouterr().err.count("remedy:") == 3


def test_options_stand_anywhere_and_are_never_abbreviated():
    for line in ("train -m a=1,2 --config-dir d b=3", "--config-dir=d train a=1,2 b=3 --multirun"):
        arguments = read(line)
        assert (arguments.verb, arguments.words) == ("train", ["a=1,2", "b=3"])
        assert (arguments.config_dir, arguments.is_multirun) == ("d", True)
    assert read("submit train --chain 3 --dry-run").words == ["train", "chain=3", "dry_run=true"]
    assert read("train optimizer.lr=-1 -1").words == ["optimizer.lr=-1", "-1"]


@pytest.mark.parametrize("option", ["--cfg job", "-c job", "--cfg=job --resolve", "--cfg"])
def test_hydras_option_prints_the_configuration(option):
    for line in (f"train {option} model=tiny", f"config train {option} model=tiny"):
        arguments = read(line)
        assert (arguments.verb, arguments.words) == ("config", ["train", "model=tiny"])


@pytest.mark.parametrize("verb", SCHEMAS)
def test_the_printed_configuration_is_the_composed_one(verb):
    shown = yaml.safe_load(printed("config", verb))
    assert set(shown) == set(vars(compose(verb, [])))


def test_a_printed_configuration_is_a_base_of_the_same(tmp_path):
    words = ["model=tiny", "optimizer=muon", 'model.pattern="[1, .125]*2"', "budget.tokens=1e5"]
    words += ["checkpoint.keep_steps=[1,2]", "log=jsonl", "eval.every=null"]
    (tmp_path / "my own.yaml").write_text(printed("config", "train", *words, "name=x"))
    again = compose("train", expand_base("train", [f"from={tmp_path}/my own.yaml"], None))
    assert again == compose("train", [*words, "name=x"])
    words = [f"from={tmp_path}/my own.yaml", "model=mod_60m", "seed=7"]
    config = compose("train", expand_base("train", words, None))
    assert config.model == compose("train", ["model=mod_60m"]).model
    assert (config.seed, config.optimizer.name, config.name) == (7, "muon", "x")
    config = compose("train", expand_base("train", [*words, "name=y"], None))
    assert config.name == "y"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("compare", ["name=c", '+arms={a: ["model.capacity=0.25"], b: ["seed=1"]}', "seeds=[1,2]"]),
        ("isoflop", ["name=g", 'families={a: ["model=tiny"]}']),
        ("plan", ["conventions=true"]),
        ("search", ["study=s", "space.optimizer.lr=interval(1e-4,1e-2)"]),
    ],
)
def test_a_printed_configuration_is_a_base_of_its_own_verb(verb, words, tmp_path):
    (tmp_path / "f.yaml").write_text(printed("config", verb, *words))
    again = expand_base(verb, ["from=f.yaml"], None)
    assert compose(verb, as_composed(verb, again)) == compose(verb, as_composed(verb, words))


def test_a_name_is_that_of_a_file_and_not_of_another_run(tmp_path):
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: first\nresume: fresh\nseed: 7\n")
    (run / "manifest.json").write_text("{}")
    for base in ("first", "runs/first", "runs/first/config.yaml", str(run)):
        assert expand_base("train", [f"from={base}"], None) == ["seed=7"], base
    (tmp_path / "mine.yaml").write_text("name: mine\nmax_time: 30m\nseed: 7\n")
    expected = ['name="mine"', 'max_time="30m"', "seed=7"]
    assert expand_base("train", ["from=mine.yaml"], None) == expected
    assert expand_base("train", ["from=mine.yaml", "name=b"], None) == [*expected, "name=b"]


def test_a_directory_of_runs_is_no_base_and_its_runs_are_named(tmp_path):
    (tmp_path / "runs/cmp/mod").mkdir(parents=True)
    (tmp_path / "runs/cmp/mod/config.yaml").touch()
    for base in ("cmp", "runs/cmp"):
        problem = problems_of(expand_base, "train", [f"from={base}"], None)["from"]
        assert "runs/cmp is no run, but has runs: cmp/mod" in problem.reason
        assert problem.remedy == "name one: from=cmp/mod; or a YAML file"


@pytest.mark.parametrize(
    ("content", "key", "line", "remedy"),
    [
        ("seed: 1\nmodle: {d_model: 3}", "modle", 2, "did you mean model?"),
        ("optimizer:\n  lrr: 3", "optimizer.lrr", 2, "did you mean optimizer.lr?"),
        ("learning_rate: 3e-4", "learning_rate", 1, "write optimizer: {lr: 3e-4}"),
        ("limit_val_batches: 3", "limit_val_batches", 1, "write eval.sequences=N"),
        ("model: tiny", "model", 1, "take it out of the file, and add model=tiny to the command"),
        ("logger: wandb", "logger", 1, "take it out of the file, and add log=wandb to the command"),
        ("model: {d_model: many}", "model.d_model", 1, "give one, such as 256"),
        ("budget:\n  tokens: 1M", "budget.tokens", 2, "write budget: {tokens: 1e6}"),
        ("budget: 1e6", "budget", 1, "write budget: {flops: 1e6} or budget: {tokens: 1e6}"),
        ("model:", "model", 1, "leave it out"),
        ("checkpoint: {keep_steps: 3}", "checkpoint.keep_steps", 1, "keep_steps: [3]"),
        ("checkpoint: {keep_steps: [null, off]}", "checkpoint.keep_steps", 1, "without null"),
        ("optimizer: {train: [null, off]}", "optimizer.train", 1, '["null", "off"]'),
        ("stop: [null, off]", "stop", 1, "top-level keys: "),
        ("model.capacity: 0.5", "model.capacity", 1, "write model: {capacity: 0.5}"),
        ("defaults: [model: tiny]", "defaults", 1, "top-level keys: "),
    ],
)
def test_a_mistake_in_a_file_has_its_key_line_and_remedy(content, key, line, remedy, tmp_path):
    (tmp_path / "f.yaml").write_text(content)
    problems = problems_of(expand_base, "train", ["from=f.yaml"], None)
    assert list(problems) == [key]
    assert problems[key].reason.endswith(f", in f.yaml, line {line}")
    assert remedy in problems[key].remedy
    assert not re.search("convert|subclass|struct|not in 'Train", str(problems[key]))


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path):
    (tmp_path / "f.yaml").write_text("modle: 3\nmodel: {d_model: x}\nbudget: {tokens: 1M}\n")
    problems = problems_of(expand_base, "train", ["from=f.yaml"], None)
    assert list(problems) == ["modle", "model.d_model", "budget.tokens"]


def test_what_is_right_in_a_file_is_not_blamed_for_what_is_not(tmp_path):
    sources = "data:\n  sources: {one: {path: a, weight: 1}, two: {path: b, weight: 2}}\n"
    stages = "  stages: [{begin: 0.5, weights: {one: 1, two: 1}}]\n"
    renamed = "model: {router: {room: 2}}\n"
    (tmp_path / "f.yaml").write_text(f"{sources}{stages}{renamed}batch: {{tokens: many}}\n")
    assert list(problems_of(expand_base, "train", ["from=f.yaml"], None)) == ["batch.tokens"]
    # A file that another program called so does not make the directory a run.
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "f.yaml").write_text("name: mine")
    assert 'name="mine"' in expand_base("train", ["from=f.yaml"], None)


@pytest.mark.parametrize(
    ("content", "key", "remedy"),
    [
        ("optimizer: {lrr: 3}", "optimizer.lrr", "did you mean optimizer.lr?"),
        ("model: tiny", "model", "as - override /model: tiny"),
        ("defaults: [override /model: tiny, _self_]\noptimizer: {lrr: 3}", "optimizer.lrr", "lr?"),
        ("budget: {tokens: 1M}", "budget.tokens", "write budget: {tokens: 1e6}"),
    ],
)
def test_a_mistake_in_a_directory_of_ones_own_is_reported_likewise(content, key, remedy, tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment/mine.yaml"
    file.write_text(f"# @package _global_\n{content}\n")
    problems = problems_of(compose, "train", ["experiment=mine"], str(tmp_path))
    assert list(problems) == [key]
    line = content.count("\n") + 2
    assert problems[key].reason.endswith(f", in {file}, line {line}")
    assert remedy in problems[key].remedy
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer/own.yaml").write_text("lrr: 3\n")
    problems = problems_of(compose, "train", ["optimizer=own"], str(tmp_path))
    assert "did you mean optimizer.lr?" in problems["optimizer.lrr"].remedy


def test_a_file_with_a_few_keys_is_a_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("budget: {tokens: 1e5}\nmodel: {router: {score: mlp}}\n")
    for verb in ("train", "plan", "compare"):
        config = compose(verb, expand_base(verb, ["from=mine.yaml"], None))
        assert config == compose(verb, ["budget.tokens=1e5", "model.router.score=mlp"])
    assert expand_base("submit", ["train", "from=mine.yaml", "nodes=2"], None)[0] == "train"


@pytest.mark.parametrize(
    ("verb", "words", "content", "text"),
    [
        ("train", ["from=nope"], "", "is no run and no file"),
        ("eval", ["from=f.yaml"], "", "is for verbs that train"),
        ("submit", ["eval", "from=f.yaml"], "", "is for verbs that train"),
        ("train", ["from=f.yaml", "experiment=quickstart"], "", "cannot be combined"),
        ("train", ["from=f.yaml"], "[1, 2]", "not a mapping"),
        ("train", ["from=f.yaml"], "a: &a [1]\nb: *a", "aliases"),
    ],
)
def test_a_base_that_cannot_be_is_reported(verb, words, content, text, tmp_path):
    (tmp_path / "f.yaml").write_text(content or "seed: 1")
    assert text in problems_of(expand_base, verb, words, None)["from"].reason


def test_words_behind_two_dashes_are_no_options():
    arguments = read_arguments(["train", "--", "name=-x", "model=tiny"], VERBS)
    assert (arguments.verb, arguments.words) == ("train", ["name=-x", "model=tiny"])
    arguments = read_arguments(["train", "-m", "--", "name=x"], VERBS)
    assert arguments.is_multirun and arguments.words == ["name=x"]


def test_each_verb_has_help_with_its_keys_groups_and_examples():
    for verb, description in VERBS.items():
        shown = verb_help(verb, description)
        assert f"modtrain {verb}" in shown
        assert EXAMPLES[verb], verb
    shown = printed("train", "--help")
    assert shown == printed("help", "train") == printed("-h", "train")
    for text in (
        "model=quickstart dense_1b",
        "log=tensorboard",
        "budget.tokens=null",
        "optimizer.lr=",
    ):
        assert re.sub(r"\s+", " ", text) in re.sub(r"\s+", " ", shown), text
    assert groups_of("submit") == {"cluster": groups_of("submit")["cluster"]}
    assert groups_of("plan") == groups_of("train")


@pytest.mark.parametrize("verb", EXAMPLES)
def test_the_examples_compose(verb):
    for line in EXAMPLES[verb]:
        arguments = read(f"{verb} {line}")
        name, words = verb, arguments.words
        if verb in ("doctor", "completion"):
            continue
        if verb in ("submit", "config"):
            name, *words = words
        words = [word for word in words if not word.startswith(("from=", "space."))]
        if arguments.is_multirun:
            words = [
                str(o.input_line) for o in parse(words, sweeps=True)[0] if not o.is_sweep_override()
            ]
        words = [str(o.input_line) for o in LaunchOverrides.split(parse(words)[0])[1]]
        compose(name, [word for word in words if word != "dry_run=true"])


def test_help_is_fast_and_lists_every_verb():
    shown = make_parser(VERBS).format_help()
    assert all(f"  {verb} " in shown for verb in VERBS)
    code = "import modtrain.cli.arguments, sys; print('hydra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
