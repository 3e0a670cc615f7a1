"""Runs on a mixture of sources: the order of each step, and what may change on the way."""

import json
import shutil
from dataclasses import replace

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from modtrain.cli.base_config import expand_base
from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError, OtherRunError
from modtrain.common.overrides import opened
from modtrain.common.shipped import conf_dir
from modtrain.data.mixture.config import MixtureStageConfig
from modtrain.experiments.sweep.jobs import overrides_between
from modtrain.inference.data_view.step_samples import samples_of
from modtrain.training.config import PlanConfig
from modtrain.training.metrics_log import read_metrics
from modtrain.training.mixture_change import check_same_mixture
from modtrain.training.plan import resolve
from modtrain.training.plan_report import show
from modtrain.training.run_directory import RunDirectory, check_same
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import assert_same_records, run, run_lines, stopping

pytestmark = pytest.mark.usefixtures("no_stop_request")

# With sequences of 64 tokens a step has half a block of the mixture.
HALF_BLOCK = ("batch.tokens=2048", "batch.micro_batch_size=8")
LATER = "data.stages=[{tokens: 4096, weights: {code: 1}}]"


@pytest.fixture
def lines(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "code")

    def of(name, *more, code="{path: %s, weight: 1}" % (tmp_path / "code")):
        sources = f"data.sources={{web: {{path: {prepared}, weight: 3}}, code: {code}}}"
        own = [line for line in run_lines(prepared, tmp_path, name) if "data.path" not in line]
        return [*own, *HALF_BLOCK, "data=mixture", "data.seq_len=64", sources, *more]

    return of


def resolved(lines):
    return resolve(compose("train", lines))[0]


def test_a_mixture_is_the_base_of_a_run_and_of_a_sweeps_jobs(lines, tmp_path):
    first = resolved(lines("one", LATER))
    run = RunDirectory.of(first)
    run.path.mkdir(parents=True)
    run.config.write_text(OmegaConf.to_yaml(OmegaConf.structured(first)))
    words = expand_base("train", [f"from={run.path}", f"runs_dir={tmp_path}", "name=two"], None)
    again = compose("train", words)
    assert again.data == first.data
    # As a job of a sweep has it, from the defaults alone.
    between = overrides_between(compose("train", ["name=two"]), again)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = hydra_compose("train", [opened(line) for line in between])
    assert OmegaConf.to_object(raw).data == first.data


def test_sources_may_be_at_another_place(lines):
    first = resolved(lines("one"))

    def with_web(**changes):
        web = replace(first.data.sources["web"], **changes)
        return replace(first, data=replace(first.data, sources=first.data.sources | {"web": web}))

    check_same(first, with_web(path="elsewhere"), "it is a run", "the run")
    with pytest.raises(OtherRunError, match=r"data\.sources\.web\.weight"):
        check_same(first, with_web(weight=9.0), "it is a run", "the run")


def test_stages_may_change_from_where_a_run_is_alone(lines):
    before = resolved(lines("one"))
    stages = [MixtureStageConfig(tokens=4096, weights={"code": 1.0})]
    now = replace(before, data=replace(before.data, stages=stages))
    check_same_mixture(before, now, 64, "it is a run")
    for first, second in ((before, now), (now, before)):
        with pytest.raises(OtherRunError, match="from sample 64 on"):
            check_same_mixture(first, second, 65, "it is a run")


def test_a_source_that_would_be_read_too_often_is_an_error_or_gives_its_weight_away(
    lines, tmp_path, capsys
):
    code = "{path: %s, max_epochs: 0.001}" % (tmp_path / "code")
    with pytest.raises(ConfigError, match=r"data\.sources\.code\.max_epochs=0\.001: does not suff"):
        resolve(compose("train", lines("one", code=code)))
    shared = compose("train", lines("one", "data.when_exhausted=redistribute", code=code))
    show(PlanConfig(**vars(shared)))
    assert "8,192 100.00%" in capsys.readouterr().out
    # Where no source suffices for a block there is nothing to read.
    sources = {n: replace(s, max_epochs=1e-4) for n, s in shared.data.sources.items()}
    with pytest.raises(ConfigError, match="suffice for 0 samples"):
        resolve(replace(shared, data=replace(shared.data, sources=sources)))


def test_sources_of_other_tokenizers_are_refused(lines, tmp_path):
    index = tmp_path / "code/index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ConfigError, match="need one tokenizer"):
        resolved(lines("one"))


def test_one_directory_and_sources_together_are_refused(lines, prepared):
    with pytest.raises(ConfigError, match="add data=mixture"):
        resolved(lines("one", f"data.path={prepared}"))


@pytest.mark.slow
def test_a_run_that_resumes_takes_the_new_stages_writes_them_down_and_reads_what_they_say(
    lines, tmp_path
):
    with stopping(1):
        assert run(lines("one")) == "stopped"
    assert run(lines("one", LATER)) == "complete"
    directory = RunDirectory(tmp_path / "one")
    assert directory.read_config().data.stages[0].weights == {"code": 1.0}
    (change,) = map(json.loads, (tmp_path / "one/mixture.jsonl").read_text().splitlines())
    assert (change["step"], change["position"], change["before"]) == (2, 64, [])
    sources = [[sample.source for sample in samples_of(directory, step)] for step in (1, 2, 3, 4)]
    assert sorted(sources[0] + sources[1]) == ["code"] * 16 + ["web"] * 48
    assert set(sources[2] + sources[3]) == {"code"}
    losses = read_metrics(tmp_path / "one/metrics.jsonl")[-1]
    assert {f"held_out/source_{name}/causal_loss" for name in ("web", "code")} <= losses.keys()
    # What has been read stays as it is.
    with pytest.raises(OtherRunError, match=r"data\.stages"):
        run(lines("one"))
    # And it is the run that had these stages from the start.
    assert run(lines("two", LATER)) == "complete"
    assert_same_records(tmp_path, "one", "two", atol=0)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("more", [["data.num_workers=2"], ["strategy=ddp", "eval.sequences=2"]])
def test_the_records_are_the_same_for_workers_and_ranks(lines, tmp_path, more):
    few = [line for line in more if line.startswith("eval")]
    assert run(lines("one", LATER, *few)) == "complete"
    ranks = 2 if "strategy=ddp" in more else 1
    results = on_ranks(run, ranks, lines("many", LATER, *more), joins=False)
    assert results == ["complete"] * ranks
    assert_same_records(tmp_path, "one", "many")
