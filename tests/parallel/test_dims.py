"""Degrees of parallelism: what follows from them, which ranks do what, and what is refused."""

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from benchmarks._paper import fake_group, groups_of
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.parallel import validation
from modtrain.parallel.config import DEGREES, PRESETS, StrategyConfig, dims_of
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.validation import dims_problems, run_problems

ALL = (0, 1, 2, 3)
# Of numbers that every group here divides.
MODEL = ModelConfig(d_model=192, num_heads=48, d_ff=768, experts=ExpertsConfig(count=12, dim=768))


@pytest.fixture(autouse=True, scope="module")
def every_degree():
    """Of the combinations alone: an older torch refuses experts' degree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "torch_release", lambda: (2, 12))
        yield


@given(
    st.sampled_from(tuple(PRESETS)),
    st.sampled_from([1, 2, 4, 6, 8, 16]),
    st.sampled_from([1, 2, 3]),
    st.fixed_dictionaries(
        {}, optional={key: st.sampled_from([None, 1, 2, 3, 4]) for key in ("shard_size", *DEGREES)}
    ),
)
def test_degrees_make_up_the_processes_or_are_an_error(name, local, nodes, degrees):
    launch = Launch(local * nodes, 0, 0, local)
    keys = PRESETS[name].keys
    config = StrategyConfig(name, **{k: v for k, v in degrees.items() if k in keys})
    assert not config.problems("strategy")
    dims = dims_of(config, MODEL, launch)
    for key, degree in {
        "tensor_parallel": dims.tensor,
        "context_parallel": dims.context,
        "expert_parallel": dims.expert,
        "shard_size": dims.shard,
    }.items():
        assert getattr(config, key) in (None, degree)
    if problems := dims_problems(config, "strategy", MODEL, launch):
        assert all(problem.remedy and problem.reason for problem in problems)
        # Nothing is refused where what is set divides, and no matrix of an expert is wasted.
        product = dims.tensor * dims.context
        product *= dims.shard if name == "hsdp" else 1
        divides = launch.world_size % product == 0 and dims.fsdp % dims.expert == 0
        if name == "single" or not divides or 12 % dims.expert:
            return
        pieces = dims.expert_shard if dims.expert > 1 else dims.fsdp
        assert MODEL.d_model % pieces and MODEL.ff_width // dims.tensor % pieces
        assert dims.expert > 1 or pieces > 12
        return
    product = dims.replicate * dims.shard * dims.context * dims.tensor
    assert product == launch.world_size
    assert dims.expert_shard * dims.expert == dims.fsdp and 12 % dims.expert == 0
    assert dims.data_parallel * dims.tensor * dims.context == launch.world_size
    ranks = [dims.data_rank(rank) for rank in range(launch.world_size)]
    assert ranks == sorted(ranks) and set(ranks) == set(range(dims.data_parallel))
    if not any(degrees.values()) and name in ("hsdp", "fsdp_tp", "fsdp_cp"):
        # Within a node.
        assert local == {"hsdp": dims.shard, "fsdp_tp": dims.tensor}.get(name, dims.context)


@pytest.mark.parametrize(
    ("name", "degrees", "launch", "key"),
    [
        ("single", {}, Launch(2, 0, 0, 2), "name"),
        ("ddp", {"world_size": 4}, Launch(2, 0, 0, 2), "world_size"),
        ("hsdp", {"shard_size": 3}, Launch(4, 0, 0, 4), "shard_size"),
        ("fsdp_tp", {"tensor_parallel": 3}, Launch(4), "tensor_parallel"),
        ("fsdp_ep", {"expert_parallel": 8}, Launch(8), "expert_parallel"),
        ("fsdp", {"tensor_parallel": 3}, Launch(4), "tensor_parallel"),
        ("fsdp_cp", {"context_parallel": 3}, Launch(4), "context_parallel"),
        ("fsdp", {"tensor_parallel": 2, "context_parallel": 4}, Launch(4), "context_parallel"),
        ("hsdp", {"shard_size": 4, "tensor_parallel": 2}, Launch(4), "shard_size"),
        ("fsdp", {"tensor_parallel": 2, "expert_parallel": 4}, Launch(4), "expert_parallel"),
    ],
)
def test_what_does_not_fit_is_reported_under_its_key(name, degrees, launch, key):
    problems = dims_problems(StrategyConfig(name, **degrees), "strategy", MODEL, launch)
    assert [problem.key for problem in problems] == [f"strategy.{key}"]


def test_expert_parallelism_requires_experts():
    problems = dims_problems(StrategyConfig("fsdp_ep"), "strategy", ModelConfig(), Launch())
    assert [p.key for p in problems] == ["strategy.name"]


@pytest.mark.parametrize(
    "config",
    [
        *(StrategyConfig("ddp", **{key: 2}) for key in ("shard_size", *DEGREES[:2])),
        StrategyConfig("deepspeed_2", expert_parallel=2),
        StrategyConfig("fsdp", shard_size=2),
        StrategyConfig("fsdp", offload=True),
        StrategyConfig("fsdp", timeout=0.0),
        StrategyConfig("fsdp", activation_checkpointing="some"),
        StrategyConfig("zero"),
    ],
)
def test_a_key_that_would_do_nothing_is_an_error(config):
    assert len(config.problems("strategy")) == 1


def test_a_compiled_layer_is_not_recomputed_whole_under_tensor_parallel():
    config = StrategyConfig("fsdp_tp", activation_checkpointing="full")
    problems = run_problems(config, "strategy", compiles=True)
    assert [problem.key for problem in problems] == ["strategy.activation_checkpointing"]
    assert run_problems(config, "strategy", compiles=False) == []


def test_experts_that_cannot_be_sharded_evenly_on_many_ranks_are_reported():
    """16 experts on 1,024 ranks would travel as 1,024 pieces of the size of one."""
    model = ModelConfig(
        d_model=2560, num_heads=20, d_ff=1280, experts=ExpertsConfig(count=16, dim=1280)
    )
    many = Launch(1024, 0, 0, 8)
    (problem,) = dims_problems(StrategyConfig("fsdp"), "strategy", model, many)
    assert (problem.key, "hsdp" in problem.remedy) == ("strategy.name", True)
    for sound in (StrategyConfig("hsdp"), StrategyConfig("fsdp_ep", expert_parallel=16)):
        assert dims_problems(sound, "strategy", model, many) == []
    assert dims_problems(StrategyConfig("fsdp"), "strategy", model, Launch(256, 0, 0, 8)) == []


@pytest.mark.parametrize(
    ("dims", "of_rank_2"),
    [
        (ParallelDims(4, shard=4), (2, {"shard": {ALL}})),
        (ParallelDims(4, replicate=2, shard=2), (2, {"replicate": {(0, 2)}, "shard": {(2, 3)}})),
        (
            ParallelDims(4, shard=2, tensor=2),
            (1, {"shard": {(0, 2)}, "tensor": {(2, 3)}, "shard_tensor": {ALL}}),
        ),
        (
            ParallelDims(4, shard=4, expert=2),
            (2, {"shard": {ALL}, "expert": {(2, 3)}, "expert_shard": {(0, 2)}}),
        ),
        (
            ParallelDims(4, shard=2, context=2, expert=4),
            (1, {"shard": {ALL}, "context": {(2, 3)}, "expert": {ALL}, "expert_shard": {(2,)}}),
        ),
        (
            ParallelDims(4, shard=2, tensor=2, expert=2),
            (
                1,
                {"shard": {(0, 2)}, "tensor": {(2, 3)}, "shard_tensor": {ALL}}
                | {"expert": {(0, 2)}, "expert_shard": {(2,)}},
            ),
        ),
    ],
    ids=str,
)
def test_neighbours_share_the_inner_groups(dims, of_rank_2):
    with fake_group(Launch(4, 2, 2, 4)):
        axes = {
            axis: {tuple(dist.get_process_group_ranks(group)) for group in groups}
            for axis, groups in groups_of(make_meshes(dims)).items()
        }
    assert (dims.data_rank(2), axes) == of_rank_2


def test_meshes_that_do_not_fit_the_ranks_are_an_error():
    with pytest.raises(ValueError, match="shard_size=3: does not divide the 4 processes"):
        make_meshes(ParallelDims(4, shard=3))
