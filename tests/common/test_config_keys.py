"""The keys of a composed configuration."""

import pytest
from omegaconf import OmegaConf

from modtrain.common.config_keys import added_keys, all_keys, nearest_keys
from modtrain.experiments.compare.config import CompareConfig

KEYS = all_keys(OmegaConf.structured(CompareConfig))


def test_all_keys_are_those_of_sections_too():
    assert {"name", "model", "model.router", "model.router.score", "arms"} <= set(KEYS)


def test_what_a_plus_adds_is_found_but_for_entries_of_dictionaries():
    config = OmegaConf.structured(CompareConfig)
    assert added_keys(config) == []
    OmegaConf.set_struct(config, False)
    for key in ("arms.a", "optimizer.lrr", "x.y", "model.router.scor"):
        OmegaConf.update(config, key, ["1"], force_add=True)
    assert sorted(added_keys(config)) == ["model.router.scor", "optimizer.lrr", "x"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optimizer.lrr", ["optimizer.lr"]),
        ("optimzer.lr", ["optimizer.lr"]),
        ("modle.d_model", ["model.d_model"]),
        ("seqlen", ["data.seq_len"]),
        ("data.seq-len", ["data.seq_len"]),
        ("top_k", ["model.experts.top_k"]),
        ("arm", ["arms"]),
        ("every", ["log.every", "eval.every", "checkpoint.every"]),
        ("trainer.devices", []),
        ("model.router.foo.bar", []),
        ("x", []),
    ],
)
def test_the_key_that_is_meant_and_no_other_is_found(wrong, meant):
    assert nearest_keys(wrong, KEYS) == meant
