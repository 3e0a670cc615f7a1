"""What is wrong with a mixture is told before it is read."""

import pytest

from modtrain.data.config import DataConfig
from modtrain.data.mixture.config import MixtureStageConfig, SourceConfig

WEB, CODE = SourceConfig("web", 3.0), SourceConfig("code", 1.0)


@pytest.mark.parametrize(
    ("config", "key", "reason"),
    [
        (DataConfig("one", sources={"web": WEB}), "path", "too"),
        (DataConfig(stages=[MixtureStageConfig(0.5, None, {"web": 1})]), "stages", "without"),
        (DataConfig(sources={"a.b": WEB}), "sources", "no name"),
        (DataConfig(sources={"web": SourceConfig()}), "sources.web.path", "empty"),
        (DataConfig(sources={"web": SourceConfig("web", -1)}), "sources", "not a weight"),
        (DataConfig(sources={"web": SourceConfig("web", 0)}), "sources", "no weight above 0"),
        (DataConfig(sources={"web": SourceConfig("web", 1e9), "code": CODE}), "sources", "less"),
        (DataConfig(sources={"web": SourceConfig("w", 1, 0)}), "sources.web.max_epochs", "above 0"),
        (DataConfig(sources={"web": WEB}, when_exhausted="stop"), "when_exhausted", "not known"),
    ],
)
def test_a_mistake_is_named_with_its_key(config, key, reason):
    (problem,) = config.problems("data")
    assert problem.key == f"data.{key}"
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (MixtureStageConfig(None, None, {"web": 1}), "stages[0]"),
        (MixtureStageConfig(0.5, 5e6, {"web": 1}), "stages[0]"),
        (MixtureStageConfig(1.0, None, {"web": 1}), "stages[0].begin"),
        (MixtureStageConfig(None, 0, {"web": 1}), "stages[0].tokens"),
        (MixtureStageConfig(0.5, None, {"news": 1}), "stages[0].weights"),
        (MixtureStageConfig(0.5, None, {}), "stages[0].weights"),
    ],
)
def test_a_mistake_of_a_stage_is_named_with_its_key(stage, key):
    config = DataConfig(sources={"web": WEB, "code": CODE}, stages=[stage])
    assert [problem.key for problem in config.problems("data")] == [f"data.{key}"]


def test_a_good_mixture_has_no_problem():
    stage = MixtureStageConfig(0.9, None, {"code": 1.0})
    assert DataConfig(sources={"web": WEB, "code": CODE}, stages=[stage]).problems("data") == []
