"""Mistakes in a model's configuration: all reported at once, each with its remedy, none raised."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError, raise_if_any
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.models.depth.pattern import layer_capacities, num_chosen
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.rope.config import RopeScalingConfig
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import configs, quick, small

# Patterns.


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("dense", [None] * 4),
        ("every", [0.25] * 4),
        ("every_other", [None, 0.25, None, 0.25]),
        ([1, 0.5, 1.0, 0.125], [None, 0.5, None, 0.125]),
        ("[1, .125]*2", [None, 0.125, None, 0.125]),
        ("[1]*2 + [.5, .125]", [None, None, 0.5, 0.125]),
        (" [ 1 , 0.3 ] * 1 + [.25,1.0] ", [None, 0.3, 0.25, None]),
        ("[1e-1, 0.2, 0.3, 1]", [0.1, 0.2, 0.3, None]),
        ("[1]+[.5]*3", [None, 0.5, 0.5, 0.5]),
    ],
)
def test_patterns_are_read(pattern, expected):
    assert layer_capacities(pattern, 0.25, 4) == expected
    config = small(pattern=pattern, capacity=0.25)
    assert config.problems() == []
    assert config.capacities == expected
    assert config.is_routed == any(share is not None for share in expected)


def test_every_at_capacity_one_still_routes():
    assert layer_capacities("every", 1.0, 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("capacity", "seq_len", "expected"),
    [(0.125, 2048, 256), (0.125, 4, 1), (0.125, 1, 1), (0.01, 10, 1), (1.0, 7, 7), (0.3, 11, 3)],
)
def test_k_is_the_rounded_share_and_at_least_one(capacity, seq_len, expected):
    assert num_chosen(capacity, seq_len) == expected


# Problems, reported at once.


def test_all_the_problems_are_reported_at_once():
    config = ModelConfig(
        d_model=64,
        num_layers=4,
        num_heads=5,
        vocab_size=100,
        activation="relu",
        init_std=-1.0,
        pattern="everyother",
        capacity=1.3,
        router=RouterConfig(gate="softmax", causal=["oracle"], predictor_dim=0),
    )
    assert {problem.key.removeprefix("model."): problem.value for problem in config.problems()} == {
        **{"num_heads": 5, "activation": "relu", "init_std": -1.0, "pattern": "everyother"},
        **{"capacity": 1.3, "router.gate": "softmax", "router.causal": "oracle"},
        "router.predictor_dim": 0,
    }
    with pytest.raises(ConfigError, match=r"^8 problems") as error:
        raise_if_any(config.problems())
    assert all(str(problem) in str(error.value) for problem in config.problems())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        # A head of width 1: RoPE turns pairs.
        *(({"num_heads": number}, "model.num_heads") for number in (3, 16, 10**6)),
        ({"head_dim": 5}, "model.head_dim"),
        *(({"num_heads": 4, "num_kv_heads": number}, "model.num_kv_heads") for number in (3, 8)),
        *(
            ({name: value}, f"model.{name}")
            for name in (
                *("d_model", "num_layers", "num_heads", "vocab_size", "num_kv_heads", "head_dim"),
                *("d_ff", "sliding_window"),
            )
            for value in (0, -1, -(10**30))
        ),
        *(
            ({name: value}, f"model.{name}")
            for name in ("rope_theta", "norm_eps", "init_std")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(
            ({"capacity": value}, "model.capacity")
            for value in (0.0, 0, -0.1, 1.3, 1e300, math.nan, math.inf, -math.inf)
        ),
        *(
            ({"pattern": value}, "model.pattern")
            for value in (
                *([], [1, 0.5], [1, 0.5] * 3, [1, 0.5, 1, 0], [1, 0.5, 1, 1.3], [1, 0.5, 1, -0.5]),
                *([1, 0.5, 1, wrong] for wrong in (math.nan, 10**400, "0.5", None, True)),
                *("[1, .5]*3", "[1, .5]*0", "[1, .5]*-2", "[1, .5]*99999999999999", "[1, 2]*2"),
                *(f"[1, .5]*{'9' * 6000}", "[1, nan]*2", "[1, inf]*2", "[1, x]*2", "[[1, .5]]*2"),
                # Tried in 2^n ways, it would take longer than anyone waits.
                " + ".join(["[1]"] * 60) + " +",
                *("[1, .5]*2 +", "[1, .5]*2 [1]", "[1, .5", "[]", "[ , ]", "", "every other"),
                *("DENSE", None, 0.5, {"layers": 4}),
            )
        ),
        ({"activation": "SwiGLU"}, "model.activation"),
        ({"router": RouterConfig(gate="")}, "model.router.gate"),
        ({"router": RouterConfig(causal=["predictor", "predictor"])}, "model.router.causal"),
        ({"router": RouterConfig(predictor_dim=-3)}, "model.router.predictor_dim"),
        ({"num_layers": 10**9}, "model.num_layers"),
        *(
            ({"mixer": value}, "model.mixer")
            for value in ("mamba", ["attention"] * 3, ["attention"] * 3 + ["conv"], None)
        ),
        *(
            ({"router": RouterConfig(**wrong)}, f"model.router.{key}")
            for wrong, key in (
                *(({key: "layer"}, key) for key in ("target", "score", "choice")),
                ({"capacity_factor": 0.5}, "capacity_factor"),
                ({"auxiliary_weight": 0.0}, "auxiliary_weight"),
                *(({"threshold_decay": value}, "threshold_decay") for value in (1.0, 1.5)),
                # What cannot be combined.
                ({"score": "random", "causal": ["predictor"]}, "causal"),
                ({"score": "fixed", "causal": ["threshold"]}, "causal"),
                ({"score": "random", "choice": "token"}, "choice"),
                ({"score": "attention", "gate": "raw"}, "gate"),
                ({"score": "attention", "causal": ["threshold"]}, "causal"),
                ({"score": "attention", "choice": "token"}, "choice"),
                ({"score": "oracle_norm", "causal": ["auxiliary"]}, "causal"),
                ({"choice": "token", "causal": []}, "causal"),
                ({"choice": "token", "causal": ["predictor"]}, "causal"),
            )
        ),
        # The attention that a router goes by has to be there, and whole.
        ({"pattern": "every", "router": RouterConfig(score="attention")}, "model.router.score"),
        (
            {"pattern": [1, 0.5, 0.5, 1], "router": RouterConfig(score="attention")},
            "model.router.score",
        ),
        ({"mixer": "convolution", "router": RouterConfig(score="attention")}, "model.router.score"),
        *(({"pattern": name, "capacity": 1.0}, "model.pattern") for name in ("cosine", "u_shape")),
        # Without a count there are no experts.
        *(
            ({"experts": ExpertsConfig(**{key: value})}, f"model.experts.{key}")
            for key, value in (("noop", 8), ("shared", 2), ("balance", "bias"), ("dim", 4))
        ),
        *(
            ({"experts": ExpertsConfig(**{"count": 4, **wrong})}, f"model.experts.{key}")
            for wrong, key in (
                ({"count": 0}, "count"),
                ({"count": 1, "top_k": 1}, "count"),
                *(({"top_k": value}, "top_k") for value in (0, 8)),
                ({"top_k": 3}, "dim"),  # d_ff=32 is no multiple of 3
                ({"shared": 1}, "dim"),
                *(({key: -1}, key) for key in ("shared", "noop")),
                ({"choice": "tokens"}, "choice"),
                ({"capacity_factor": 0.0}, "capacity_factor"),
                ({"balance": "even"}, "balance"),
                *(({"choice": "expert", "balance": way}, "balance") for way in ("loss", "bias")),
                *(({"balance_weight": value}, "balance_weight") for value in (-1.0, math.nan)),
                ({"z_loss_weight": math.inf}, "z_loss_weight"),
                ({"bias_rate": 0.0}, "bias_rate"),
                ({"every": 5}, "every"),
                ({"threshold_decay": 1.0}, "threshold_decay"),
            )
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_mistake_is_reported_once_under_its_key(changes, key):
    config = small(**changes)
    problems = config.problems()
    assert [problem.key for problem in problems] == [key]
    assert problems[0].reason
    assert problems[0].remedy
    assert len(str(problems[0])) < 20_000


@pytest.mark.parametrize(("d_model", "num_heads"), [(96, 5), (64, 3), (96, 1000), (250, 4)])
def test_the_remedy_for_heads_can_be_followed(d_model, num_heads):
    (problem,) = small(d_model=d_model, num_heads=num_heads).problems()
    advised = problem.remedy.removeprefix("use ").split(", or set ")[0].split(", ")
    for number in advised:
        assert small(d_model=d_model, num_heads=int(number)).problems() == []
    assert small(d_model=d_model, num_heads=num_heads, head_dim=8).problems() == []


def test_an_odd_width_can_only_be_given_a_head_dim():
    (problem,) = small(d_model=33, num_heads=2).problems()
    assert problem.remedy == "set model.head_dim"


@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
def test_the_remedy_for_a_pattern_can_be_followed(num_layers):
    (problem,) = small(num_layers=num_layers, pattern="sometimes").problems()
    assert "every_other" in problem.remedy
    override = problem.remedy.split("'")[1]
    assert override.startswith('model.pattern="')
    quoted = override.split('"')[1]
    assert small(num_layers=num_layers, pattern=quoted).problems() == []


def test_a_problem_is_found_at_once_however_large_the_numbers():
    start = time.monotonic()
    (problem,) = small(d_model=10**15 + 1, num_heads=10**9).problems()
    assert problem.key == "model.num_heads"
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("changes", "ff_width"),
    [
        ({"d_model": 256}, 704),  # 8/3 d = 682.7, up to a multiple of 64
        ({"d_model": 24}, 64),  # exactly one multiple
        ({"d_model": 192}, 512),
        ({"d_model": 192, "activation": "gelu"}, 768),
        ({"d_model": 192, "d_ff": 100}, 100),
    ],
)
def test_what_is_left_open_is_derived(changes, ff_width):
    config = ModelConfig(num_heads=4, **changes)
    assert config.ff_width == ff_width
    assert config.head_width == config.d_model // 4
    assert config.kv_heads == 4
    assert ModelConfig(num_heads=4, num_kv_heads=2, head_dim=10).kv_heads == 2
    assert ModelConfig(num_heads=4, head_dim=10).head_width == 10


def test_vocabulary_waits_for_the_tokenizer():
    config = small(vocab_size=None)
    assert config.problems() == []
    with pytest.raises(ValueError, match="tokenizer"):
        _ = config.vocabulary


INTEGERS = st.integers() | st.integers(-5, 70) | st.sampled_from([10**18, 2**63, -(10**40)])
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 2)
LIST_TEXTS = st.text("[],.*+ 0123456789e-naif", max_size=30)


@quick(400)
@given(
    st.builds(
        ModelConfig,
        d_model=INTEGERS,
        num_layers=INTEGERS,
        num_heads=INTEGERS,
        vocab_size=st.none() | INTEGERS,
        num_kv_heads=st.none() | INTEGERS,
        head_dim=st.none() | INTEGERS,
        d_ff=st.none() | INTEGERS,
        activation=st.sampled_from(["swiglu", "gelu"]) | st.text(),
        tie_embeddings=st.booleans(),
        qk_norm=st.booleans(),
        qkv_bias=st.booleans(),
        rope_scaling=st.builds(
            RopeScalingConfig,
            name=st.sampled_from(["linear", "llama3", "yarn"]) | st.text(),
            factor=FLOATS,
            original_positions=st.none() | INTEGERS,
            high_freq_factor=FLOATS,
            beta_slow=FLOATS,
            attention_factor=st.none() | FLOATS,
        ),
        sliding_window=st.none() | INTEGERS,
        rope_theta=FLOATS,
        norm_eps=FLOATS,
        init_std=FLOATS,
        pattern=st.sampled_from(["dense", "every", "every_other", "[1, .125]*2"])
        | st.text()
        | LIST_TEXTS
        | st.lists(FLOATS | INTEGERS | st.text() | st.none(), max_size=6),
        capacity=FLOATS,
        mixer=st.sampled_from(["attention", "convolution"])
        | st.none()
        | INTEGERS
        | st.lists(st.sampled_from(["attention", "convolution"]) | st.text() | INTEGERS),
        conv_width=INTEGERS,
        loss_chunk=st.none() | INTEGERS,
        router=st.builds(
            RouterConfig,
            target=st.sampled_from(["block", "mlp", "both"]) | st.text(),
            score=st.sampled_from(["linear", "attention", "random"]) | st.text(),
            hidden_dim=INTEGERS,
            gate=st.none() | st.sampled_from(["raw", "none"]) | st.text(),
            choice=st.sampled_from(["expert", "token"]) | st.text(),
            capacity_factor=FLOATS,
            causal=st.none()
            | st.lists(st.sampled_from(["predictor", "threshold"]) | st.text(), max_size=3),
            auxiliary_weight=FLOATS,
            predictor_dim=INTEGERS,
            threshold_decay=FLOATS,
        ),
        experts=st.builds(
            ExpertsConfig,
            count=st.none() | INTEGERS,
            top_k=INTEGERS,
            dim=st.none() | INTEGERS,
            shared=INTEGERS,
            noop=INTEGERS,
            choice=st.sampled_from(["expert", "token"]) | st.text(),
            capacity_factor=st.none() | FLOATS,
            balance=st.none() | st.sampled_from(["loss", "bias"]) | st.text(),
            balance_weight=FLOATS,
            bias_rate=FLOATS,
            z_loss_weight=FLOATS,
            every=INTEGERS,
            threshold_decay=FLOATS,
        ),
    )
)
def test_looking_for_problems_never_raises(config):
    for problem in config.problems("teacher"):
        assert problem.key.startswith("teacher.")
        assert problem.remedy
        assert str(problem)


@quick(40)
@given(configs())
def test_a_configuration_without_problems_builds(config):
    assert config.problems() == []
    Transformer(config)
