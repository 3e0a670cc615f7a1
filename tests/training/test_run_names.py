"""Names of runs that were started without one."""

import multiprocessing
from dataclasses import replace

import pytest

from modtrain.common.errors import ConfigError
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.training.config import TrainConfig
from modtrain.training.run_names import claim_name, model_kind

SMALL = ModelConfig(d_model=64, num_layers=2, vocab_size=300)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(runs_dir=str(tmp_path / "runs"), model=SMALL)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "mod-150k"),
        ({"pattern": "dense", "d_model": 256, "num_layers": 6}, "dense-5.0m"),
        ({"experts": ExpertsConfig(count=8, top_k=1)}, "mode-"),
        ({"pattern": "dense", "experts": ExpertsConfig(count=8, top_k=1)}, "moe-"),
        ({"pattern": "dense", "experts": ExpertsConfig(count=8, top_k=1, noop=1)}, "mode-"),
        ({"vocab_size": None}, "mod"),
    ],
)
def test_a_name_describes_the_model(config, changes, kind):
    assert model_kind(replace(config, model=replace(SMALL, **changes))).startswith(kind)


def test_names_are_numbered_and_none_is_given_twice(config, tmp_path):
    first = claim_name(config, {})
    assert first.endswith("-1")
    (tmp_path / "runs" / first).rename(tmp_path / "runs" / f"{first[:-1]}7")
    assert claim_name(config, {}).endswith("-8")


def claim_many(config, names):
    for _ in range(20):
        names.put(claim_name(config, {}))


def test_two_that_start_at_once_get_different_names(config):
    context = multiprocessing.get_context("fork")
    names = context.Queue()
    starts = [context.Process(target=claim_many, args=(config, names)) for _ in range(2)]
    for start in starts:
        start.start()
    given = [names.get(timeout=20) for _ in range(40)]
    for start in starts:
        start.join()
    assert len(set(given)) == 40


def test_a_job_that_is_requeued_finds_its_run(config):
    job = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}
    assert claim_name(config, job) == claim_name(config, job)
    assert claim_name(config, job).endswith("-job-4711.0")
    assert claim_name(config, {"SLURM_JOB_ID": "4711"}).endswith("-job-4711")


def test_restarts_by_torchrun_need_a_name(config):
    with pytest.raises(ConfigError, match=r"max-restarts(.|\n)*name=my_run"):
        claim_name(config, {"TORCHELASTIC_MAX_RESTARTS": "3"})
