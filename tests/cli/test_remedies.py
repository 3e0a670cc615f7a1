"""Wrong spellings, and that what is advised for each works."""

import os
import re
import shlex

import pytest
from omegaconf import OmegaConf

from modtrain.cli.compose import SCHEMAS, compose, conf_dir
from modtrain.cli.local_ranks import KEYS as LAUNCH_KEYS
from modtrain.common.config_keys import all_keys
from modtrain.common.errors import CheckpointError, ConfigError
from modtrain.common.other_tools import CHOICES, KEYS, SENTENCES, VALUES, key_here
from modtrain.training.named_runs import open_run
from modtrain.training.plan import resolve

pytestmark = pytest.mark.usefixtures("empty_cwd")

MISSING = ("none is given", "a run needs a name")
PLAN = ("model=tiny", "model.vocab_size=300", "data.seq_len=64")


def problems_of(verb, overrides):
    """Everything that composing and planning refuse, without what is merely missing."""
    try:
        config = compose(verb, overrides)
        if verb == "plan":
            resolve(config, needs_data=False)
        else:
            found_none = config.problems()
            if found_none:
                raise ConfigError(found_none)
    except ConfigError as error:
        return error.problems
    return []


def advised(remedy):
    """The overrides that a remedy says to write: the first of several."""
    text = remedy.removeprefix("write ").partition("; ")[0].partition(", with all")[0]
    if not remedy.startswith("write "):
        text = re.search(r"'[\w.]+=.*'", remedy)[0]
    return shlex.split(text)[0]


def check_advice(verb, wrong, kept=()):
    """Put what is advised in the place of ``wrong``; return what was advised."""
    problems = problems_of(verb, [*kept, *wrong])
    (problem,) = [p for p in problems if not p.reason.startswith(MISSING)]
    for text in ("EOF", "mismatched", "ListConfig", "subclass", "could not be converted", "struct"):
        assert text not in str(problem)
    right = advised(problem.remedy)
    left = problems_of(verb, [*kept, right])
    assert [p for p in left if not p.reason.startswith(MISSING)] == []
    return right


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("budget=1e12", "budget.flops=1e12"),
        ("budget.tokens=1M", "budget.tokens=1e6"),
        ("budget.tokens=1_000_000,0", None),
        ("budget.tokens=1X", None),
        ("budgt.tokens=1e6", None),
        ("max_steps=1k", "budget.steps=1000"),
        ("budget.steps=1e3", "budget.steps=1000"),
        ("batch.tokens=16k", None),
        ("batch.tokens=16,384", "batch.tokens=16384"),
        ("model.capacity=12.5%", "model.capacity=0.125"),
        ("model.capacity=1/8", "model.capacity=0.125"),
        ("model.pattern=1,0.125,1,0.125", "model.pattern=[1,0.125,1,0.125]"),
        ("model.pattern=[1,0.125,1,0.125", "model.pattern=[1,0.125,1,0.125]"),
        ("model.pattern=1,0.125,1,0.125]", "model.pattern=[1,0.125,1,0.125]"),
        ("checkpoint.keep_steps=[null,off]", None),
        ("checkpoint.keep_steps=[3,4", "checkpoint.keep_steps=[3,4]"),
        ("optimizer.train=[null,off]", 'optimizer.train=["null", "off"]'),
        ("model.pattern=foo", 'model.pattern="[1, .125]*2"'),
        ("checkpoint.keep_steps=3", "checkpoint.keep_steps=[3]"),
        ("checkpoint.keep_steps=3,4", "checkpoint.keep_steps=[3,4]"),
        ("name=a=b", 'name="a=b"'),
        ("name=say [x", 'name="say [x"'),
        ("data.shuffle=yes,no", None),
        ("eval=200", "eval.every=200"),
        ("data=data/mine", 'data.path="data/mine"'),
        ("data.path=[a]", None),
    ],
)
def test_what_is_advised_for_a_value_works(wrong, right):
    if right is None:
        is_budget = wrong.startswith("bud")
        problems = problems_of("plan", [*PLAN, wrong, *([] if is_budget else ["budget.steps=1"])])
        (problem,) = problems
        assert problem.remedy
        assert "converted" not in problem.reason
    else:
        assert check_advice("plan", [wrong], PLAN) == right


@pytest.mark.parametrize(
    ("verb", "wrong", "right"),
    [
        ("train", ["model", "tiny"], "model=tiny"),
        ("train", ["tiny"], "model=tiny"),
        ("train", ["pattern", "every"], "model.pattern=every"),
        ("train", ["my_run"], "name=my_run"),
        ("eval", ["runs/first"], "run=first"),
        ("eval", ["runs=first"], "run=first"),
        ("logs", ["first"], "run=first"),
        ("generate", ["prompt=hello,", "world"], 'prompt="hello, world"'),
        ("generate", ["hello", "there"], 'prompt="hello there"'),
        ("generate", ["text=hello", "there,", "world"], 'prompt="hello there, world"'),
        ("prepare", ["sources=/x/*.txt"], "sources=[/x/*.txt]"),
        ("prepare", ["/x/1.txt", "/x/2.txt", "/x/3.txt", "/x/4.txt"], "sources=[/x/*.txt]"),
        ("prepare", ["sources=a.txt", "b.txt", "c.txt"], "sources=[a.txt,b.txt,c.txt]"),
        ("prepare", ["sources=[a.txt]", "b.txt"], "sources=[a.txt,b.txt]"),
        ("prepare", ["sources=[a.txt,", "b.txt]"], "sources=[a.txt, b.txt]"),
        ("prepare", ["input=a.txt", "b.txt"], "sources=[a.txt,b.txt]"),
        ("prepare", ["sources=[[v1]", "set/*]"], 'sources=["[v1] set/*"]'),
        ("prepare", ["sources=[[v1] set/*]"], 'sources=["[v1] set/*"]'),
        ("prepare", ["sources=[[v1] set/*, b.txt]"], 'sources=["[v1] set/*", "b.txt"]'),
        ("prepare", ["output=/mnt/My", "Drive/data"], 'output="/mnt/My Drive/data"'),
        ("train", ["checkpoint.keep_steps=[3,", "4]", "tiny"], "checkpoint.keep_steps=[3, 4]"),
        ("train", ["name=my", "long", "name"], 'name="my long name"'),
        ("report", ["runs=a", "b"], "runs=[a,b]"),
        ("prepare", ["input=a.txt"], "sources=[a.txt]"),
        ("prepare", ["corpus=my/input.txt"], 'sources=["my/input.txt"]'),
        ("report", ["runs/first"], "runs=[first]"),
        ("fit", ["my points.csv"], 'points="my points.csv"'),
        ("checkpoints", ["consolidate"], "action=consolidate"),
        ("checkpoints", ["prune=true"], "action=prune"),
    ],
)
def test_what_is_advised_for_words_works(verb, wrong, right):
    needed = {
        "generate": ("run=first",),
        "fit": ("output=x",),
        "report": ("output=x",),
    }
    if verb == "generate":
        assert check_advice(verb, wrong, needed[verb]) == right
        return
    problems = problems_of(verb, [*needed.get(verb, ()), *wrong])
    problem, *more = [p for p in problems if p.remedy.startswith("write ")]
    assert [p.remedy for p in more] == (
        ["write model=tiny"] if wrong[-1:] == ["tiny"] and more else []
    )
    word = advised(problem.remedy)
    assert word == right or (verb == "prepare" and right in problem.remedy)
    assert problem.key not in {p.key for p in problems_of(verb, [*needed.get(verb, ()), word])}


def test_what_others_call_a_key_is_answered_with_it():
    keys = {verb: all_keys(OmegaConf.structured(schema)) for verb, schema in SCHEMAS.items()}
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]
    for target, names in {**KEYS, **CHOICES}.items():
        verbs = [verb for verb in keys if target in keys[verb]]
        assert verbs, target
        for name in names:
            theirs = name if "." in name else f"trainer.{name}"
            answers = {key_here(theirs, keys[verb], groups) for verb in verbs}
            # Elsewhere the name is that of another key.
            assert target in answers, (target, name)
    assert [group for group in CHOICES if group not in groups] == []


@pytest.mark.parametrize(
    ("verb", "wrong", "right"),
    [
        ("plan", "trainer.max_steps=1e3", "budget.steps=1000"),
        ("plan", "learning_rate=3e-4", "optimizer.lr=3e-4"),
        ("plan", "logger=wandb", "log=wandb"),
        ("plan", "trainer.accelerator=gpu", "strategy.accelerator=cuda"),
        ("generate", "max_new_tokens=9", "max_tokens=9"),
        ("plan", "train.max_tokens=3B", "budget.tokens=3e9"),
        ("plan", "checkpoint.interval=500", "checkpoint.every=500"),
        ("plan", "eval.interval=50", "eval.every=50"),
        ("plan", "wandb=true", "log=wandb"),
        ("plan", "model.name=tiny", "model=tiny"),
        ("export", "output_dir=out", "output=out"),
        ("eval", "ckpt_path=first", "run=first"),
    ],
)
def test_the_answer_has_the_value_as_it_is_written_here(verb, wrong, right):
    key = wrong.partition("=")[0]
    (problem,) = [p for p in problems_of(verb, [wrong]) if p.key == key]
    assert problem.remedy == f"write {right}"


@pytest.mark.parametrize("name", {text: name for name, text in SENTENCES.items()}.values())
def test_what_has_no_key_is_answered_with_a_way(name):
    theirs = name if "." in name else f"trainer.{name}"
    (problem,) = [p for p in problems_of("plan", [*PLAN, f"{theirs}=4"]) if p.key != "budget"]
    assert problem.remedy == SENTENCES[name].format(value="4")
    for word in re.findall(r"[\w.]+=[\w]+", problem.remedy):
        if word.partition("=")[0] in LAUNCH_KEYS:
            # Of what starts the ranks, before anything is composed.
            continue
        override = re.sub("=(N|NAME)$", "=65536", word)
        verb = "submit" if word.startswith("nodes") else "plan"
        if word.startswith("run="):
            verb = "eval"
        wrong = {
            p.key for p in problems_of(verb, [*PLAN, override] if verb == "plan" else [override])
        }
        assert override.partition("=")[0] not in wrong


@pytest.mark.parametrize("key", VALUES)
def test_what_others_call_a_value_is_answered_with_it(key):
    for here, other in {here: other for other, here in VALUES[key].items()}.items():
        problems = {p.key: p for p in problems_of("plan", [*PLAN, f"{key}={other}"])}
        (problem,) = [p for at, p in problems.items() if at.startswith(key)]
        assert f"did you mean {here}?" in problem.remedy
        assert not [p for p in problems_of("plan", [*PLAN, f"{key}={here}"]) if p.key == key]


@pytest.mark.parametrize("wrong", ["trainer.foo=3", "zzz=1", "trainer.loops=2", "foo.bar.baz=1"])
def test_nothing_is_suggested_where_nothing_is_meant(wrong):
    (problem,) = [p for p in problems_of("plan", [*PLAN, wrong]) if p.key != "budget"]
    assert problem.remedy.startswith("top-level keys: ")


@pytest.mark.parametrize(
    ("verb", "wrong", "right"),
    [
        ("compare", "arms={a:[seed=0],b:[]}", 'arms={a: ["seed=0"], b: []}'),
        (
            "compare",
            "+arms={'a': ['seed=0', seed=1], b: []}",
            '+arms={a: ["seed=0", "seed=1"], b: []}',
        ),
        ("compare", "arms={a: seed=0, b: seed=1}", 'arms={a: ["seed=0"], b: ["seed=1"]}'),
        ("isoflop", "families={a:[model=tiny]}", 'families={a: ["model=tiny"]}'),
        ("fit", "columns={loss: last (nats)=x}", 'columns={loss: "last (nats)=x"}'),
    ],
)
def test_a_dictionary_is_answered_with_one_that_works(verb, wrong, right):
    (problem,) = (
        p
        for p in problems_of(verb, [wrong])
        if p.key.strip("+") == right.strip("+").partition("=")[0]
    )
    assert advised(problem.remedy) == right
    key = right.partition("=")[0].strip("+")
    assert key not in {p.key for p in problems_of(verb, [right])}


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_a_dictionary_of_names_needs_no_plus(plus):
    config = compose("compare", [f'{plus}arms={{a: ["seed=1"], b: []}}'])
    assert config.arms == {"a": ["seed=1"], "b": []}
    assert compose("fit", [f"{plus}columns.loss=last"]).columns == {"loss": "last"}


def test_a_malformed_budget_is_one_problem():
    for wrong in ("budget.tokens=1M", "budget.tokens=[1", "budgt.tokens=1e6", "max_steps=1k"):
        assert len(problems_of("plan", [*PLAN, wrong])) == 1, wrong


@pytest.mark.parametrize("words", [["sources=a", "b"], ["sources=[a.txt]"]])
def test_a_key_of_another_verb_is_not_advised(words):
    problems = problems_of("plan", [*PLAN, "budget.steps=1", *words])
    assert [p.reason for p in problems] == ["is not a key of this configuration"]


@pytest.mark.parametrize("name", ["runs/nope", "./runs/nope/", "nope"])
def test_a_run_that_is_not_there_is_named_without_its_directory(name, tmp_path):
    (tmp_path / "runs/cmp/mod").mkdir(parents=True)
    (tmp_path / "runs/cmp/mod/config.yaml").touch()
    with pytest.raises(CheckpointError, match="there is no run runs/nope; there are: cmp/mod"):
        open_run("runs", compose("eval", [f'run="{name}"']).run)
    with pytest.raises(CheckpointError, match="did you mean run=cmp/mod"):
        open_run("runs", compose("eval", ["run=runs/cmp/mode"]).run)


def test_a_run_is_resumed_by_its_name():
    problems = [problems_of("train", [f"resume={value}"]) for value in ("true", "first")]
    remedies = [next(p.remedy for p in of_one if p.key == "resume") for of_one in problems]
    assert remedies[0] == "did you mean auto?"
    assert remedies[1].endswith("a run is resumed by its name: name=NAME")


def test_the_newest_run_is_named(tmp_path):
    for number, name in enumerate(("old", "newer", "middle")):
        path = tmp_path / "runs" / name / "config.yaml"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, [1, 3, 2][number]))
    with pytest.raises(CheckpointError, match="the newest is run=newer"):
        open_run("runs", "last")


@pytest.mark.parametrize("wrong", ["={a: data/mine}", ".a={path: data/mine}", ".a.path=data/mine"])
def test_a_source_of_a_mixture_is_answered_with_the_dictionary(wrong):
    right = check_advice("plan", [f"data.sources{wrong}"], (*PLAN, "data=mixture"))
    assert right == 'data.sources={a: {path: "data/mine"}}'
