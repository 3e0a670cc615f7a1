"""Where a process stands, as launchers tell it, and what strategies make of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modtrain.common.errors import ConfigError
from modtrain.distributed.launch import Launch
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.parallel.config import (
    STRATEGIES,
    StrategyConfig,
    sizes_of,
)
from modtrain.parallel.validation import run_problems, size_problems

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"},
}


def test_torchrun_and_srun_tell_the_same():
    expected = Launch(8, 5, 1, 4)
    assert Launch.from_environment(TORCHRUN) == Launch.from_environment(SRUN) == expected
    assert (expected.num_nodes, expected.node) == (2, 1)


def test_without_a_launcher_a_process_is_alone():
    assert Launch.from_environment({}) == Launch()
    batch_script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert Launch.from_environment(batch_script) == Launch()


def test_what_is_exported_is_read_back():
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "1"}
    Launch.from_environment(SRUN).export(environment)
    assert Launch.from_environment(environment) == Launch(8, 5, 1, 4)
    assert environment["GROUP_RANK"] == "1"
    alone: dict[str, str] = {}
    Launch().export(alone)
    assert not alone


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"RANK": "8"}, "RANK"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
    ],
)
def test_a_launcher_that_tells_nonsense_is_an_error(changed, key):
    with pytest.raises(ConfigError) as error:
        Launch.from_environment(TORCHRUN | changed)
    assert [problem.key for problem in error.value.problems] == [key]


def test_processes_that_do_not_know_where_to_meet_are_an_error():
    with pytest.raises(ConfigError, match="need a rendezvous address"):
        Launch(2, 0, 0, 2).export({"MASTER_PORT": "1"})


# Of numbers that every group here divides.
MODEL = ModelConfig(d_model=192, num_heads=48, d_ff=768, experts=ExpertsConfig(count=12, dim=768))


@given(
    st.sampled_from(STRATEGIES),
    st.sampled_from([1, 2, 4, 6, 8, 16]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 1, 2, 3, 4]),
)
def test_groups_divide_the_processes_or_are_told(name, local, nodes, group):
    launch = Launch(local * nodes, 0, 0, local)
    key = {
        **{"hsdp": "shard_size", "fsdp_tp": "tensor_parallel", "fsdp_ep": "expert_parallel"},
        "fsdp_cp": "context_parallel",
    }
    config = StrategyConfig(name, **({key[name]: group} if name in key else {}))
    assert not config.problems("strategy")
    sizes = sizes_of(config, MODEL, launch)
    if size_problems(config, "strategy", MODEL, launch):
        alone = name == "single" and launch.world_size > 1
        copies = max(1, launch.world_size // sizes.expert)
        uneven = name == "fsdp_ep" and MODEL.d_model % copies and MODEL.ff_width % copies
        pieces, width = sizes.shard, MODEL.ff_width // sizes.tensor
        wasteful = pieces > 12 and MODEL.d_model % pieces and width % pieces
        assert alone or uneven or wasteful or (group and (launch.world_size % group or 12 % group))
        return
    assert sizes.data_parallel * sizes.tensor * sizes.context == launch.world_size
    assert launch.world_size % sizes.shard == launch.world_size % sizes.expert == 0
    assert 12 % sizes.expert == 0
    if name in key and group is None:
        # Within a node, where that goes.
        groups = {"hsdp": sizes.shard, "fsdp_tp": sizes.tensor, "fsdp_cp": sizes.context}
        own = groups.get(name, local)
        assert own == local


@pytest.mark.parametrize(
    ("config", "launch", "key"),
    [
        (StrategyConfig("single"), Launch(2, 0, 0, 2), "strategy.name"),
        (StrategyConfig("ddp", world_size=4), Launch(2, 0, 0, 2), "strategy.world_size"),
        (StrategyConfig("hsdp", shard_size=3), Launch(4, 0, 0, 4), "strategy.shard_size"),
        (StrategyConfig("fsdp_tp", tensor_parallel=3), Launch(4), "strategy.tensor_parallel"),
        (StrategyConfig("fsdp_ep", expert_parallel=8), Launch(8), "strategy.expert_parallel"),
    ],
)
def test_what_does_not_fit_is_told_by_its_key(config, launch, key):
    assert [p.key for p in size_problems(config, "strategy", MODEL, launch)] == [key]


def test_experts_are_asked_for_where_they_are_spread():
    found = size_problems(StrategyConfig("fsdp_ep"), "strategy", ModelConfig(), Launch())
    assert [p.key for p in found] == ["strategy.name"]


@pytest.mark.parametrize(
    "config",
    [
        StrategyConfig("ddp", shard_size=2),
        StrategyConfig("fsdp", tensor_parallel=2),
        StrategyConfig("hsdp", expert_parallel=2),
        StrategyConfig("fsdp", offload=True),
        StrategyConfig("fsdp", timeout=0.0),
        StrategyConfig("zero"),
    ],
)
def test_a_key_that_would_do_nothing_is_an_error(config):
    assert len(config.problems("strategy")) == 1


def test_a_compiled_layer_is_not_recomputed_whole_under_tensor_parallel():
    config = StrategyConfig("fsdp_tp", activation_checkpointing="full")
    found = run_problems(config, "strategy", compiles=True)
    assert [problem.key for problem in found] == ["strategy.activation_checkpointing"]
    assert run_problems(config, "strategy", compiles=False) == []


def test_experts_that_cannot_be_cut_evenly_on_many_ranks_are_told():
    """16 experts on 1,024 ranks would travel as 1,024 pieces of the size of one."""
    model = ModelConfig(
        d_model=2560, num_heads=20, d_ff=1280, experts=ExpertsConfig(count=16, dim=1280)
    )
    many = Launch(1024, 0, 0, 8)
    (found,) = size_problems(StrategyConfig("fsdp"), "strategy", model, many)
    assert (found.key, "hsdp" in found.remedy) == ("strategy.name", True)
    for sound in (StrategyConfig("hsdp"), StrategyConfig("fsdp_ep", expert_parallel=16)):
        assert size_problems(sound, "strategy", model, many) == []
    assert size_problems(StrategyConfig("fsdp"), "strategy", model, Launch(256, 0, 0, 8)) == []
