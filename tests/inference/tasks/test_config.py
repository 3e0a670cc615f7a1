"""Mistakes in what is asked for are told before a run is read."""

import pytest

from modtrain.common.errors import ConfigError
from modtrain.inference.config import EvalRunConfig
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.tasks.evaluate_tasks import evaluate_tasks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"task": TaskConfig(limit=3)}, ["task.limit"]),
        ({"tasks": []}, ["tasks"]),
        ({"tasks": ["https://example.org/a.jsonl"]}, ["tasks"]),
        ({"tasks": ["copy"], "swap": True, "sequences": 3}, ["sequences", "swap"]),
        ({"tasks": ["copy"], "task": TaskConfig(path="nowhere")}, ["task.path"]),
        ({"tasks": ["copy"], "task": TaskConfig(allow_code=True)}, ["task.allow_code"]),
        (
            {"tasks": ["copy"], "task": TaskConfig(limit=0, num_fewshot=-1)},
            ["task.limit", "task.num_fewshot"],
        ),
        ({"tasks": ["copy"], "sweep": [0.1], "task": TaskConfig(seed=3)}, []),
    ],
)
def test_settings_that_cannot_be(settings, expected, empty_cwd):
    assert [p.key for p in EvalRunConfig(run="a", **settings).problems()] == expected


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lm-eval, which is not installed\n.*modtrain\[tasks\]"):
        evaluate_tasks(EvalRunConfig(run="a", tasks=["copy"]))
