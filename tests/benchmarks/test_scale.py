"""A rank of 1,024 computes and sends in a step as in theory, and no more than one of 128."""

import functools
import gc
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks._control import save_cost, store_cost
from benchmarks._paper import ALL, Paper, fake_group, trace
from benchmarks._traffic import theory
from benchmarks.scale import overrides
from modtrain.distributed.launch import Launch
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.meshes import make_meshes

SEQ_LEN, VOCAB = 32, 64
_MOD = (
    *("model=tiny", "model.num_layers=2", f"model.vocab_size={VOCAB}", "precision=bf16"),
    "model.router.causal=[predictor,threshold]",
)
_DENSE = (*_MOD, "model.pattern=dense")
# On 16 ranks experts' matrices are sharded by another dim than the experts'; on 128 none is even.
_MODE = (
    *_MOD,
    *("model.experts.count=8", "model.experts.top_k=2", "model.experts.shared=1"),
    *("model.experts.noop=4", "model.experts.dim=64", "model.experts.balance=bias"),
)
_LIMITED = (*_MOD, "model.experts.count=6", "model.experts.capacity_factor=1.25")
SETUPS = (
    *("fsdp", "hsdp/8", "fsdp_ep/4", "fsdp_tp/2", "fsdp_cp/2"),
    *("fsdp/tp2/cp2", "hsdp/4/tp2", "fsdp/ep4/tp2", "fsdp/ep4/cp2", "hsdp/4/cp2/ep4"),
)


@functools.cache
def traced(setup: str, world_size: int, lines: tuple[str, ...] = _MODE, rank: int = 0) -> Paper:
    # The experts have to be divisible by the ranks that shard them.
    wide = ["model.experts.dim=2048"] if lines is _MODE else []
    return trace(world_size, rank, SEQ_LEN, [*lines, *wide, *overrides(setup)])


def numbers(paper: Paper) -> dict[tuple[str, str], int]:
    return {key: traffic.number for key, traffic in paper.traffic.items()}


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_a_rank_of_1024_does_what_a_rank_of_128_does(setup):
    few, many = traced(setup, 128), traced(setup, 1024)
    assert numbers(few) == numbers(many)
    assert few.operators == many.operators > 500


@pytest.mark.slow
@pytest.mark.on_commit(3)
@pytest.mark.parametrize(
    ("setup", "world_size", "lines"),
    [
        *((setup, 16, _MODE) for setup in SETUPS),
        *(pytest.param(s, 1024, _MODE, marks=pytest.mark.slow) for s in SETUPS),
        *(
            pytest.param(setup, 16, _MOD, marks=pytest.mark.slow)
            for setup in ("fsdp", "fsdp_tp/2", "fsdp_cp/2")
        ),
        # Groups for which no number of tokens comes out even, and experts with limited capacity.
        ("fsdp_cp/3", 6, _LIMITED),
    ],
)
def test_every_collective_and_every_byte_is_that_of_theory(setup, world_size, lines):
    paper = traced(setup, world_size, lines)
    expected = theory(paper)
    assert paper.traffic.keys() == expected.keys()
    for key, wanted in expected.items():
        actual = paper.traffic[key]
        assert actual.number == wanted.number, key
        assert actual.sent == pytest.approx(wanted.bound, rel=1e-12), key
        assert wanted.bound >= wanted.sent > 0, key


def test_a_layer_is_gathered_twice_in_bf16_and_the_rest_once_in_fp32():
    # Eight ranks, which every shape but the predictors' biases comes out even on.
    paper = traced("fsdp", 8, _DENSE)
    matrices = sum(
        shape.numel()
        for name, shape in paper.shapes.items()
        if name.startswith("layers.") and len(shape) == 2
    )
    rest = sum(shape.numel() for shape in paper.shapes.values()) - matrices
    gathered, reduced = paper.traffic["all-gather", ALL], paper.traffic["reduce-scatter", ALL]
    assert gathered.sent == (2 * 2 * matrices + 4 * rest) * 7 / 8
    assert reduced.sent == (4 * matrices + 4 * rest) * 7 / 8
    assert (gathered.number, reduced.number) == (2 * 2 + 1, 2 + 1)
    # One sum of one number clips the gradients.
    assert paper.traffic["all-reduce", ALL].sent == 2 * 4 * 7 / 8
    assert paper.state["parameters"] == paper.state["gradients"] == 4 * (matrices + rest) / 8
    assert paper.state["optimizer"] == 2 * paper.state["parameters"]


@pytest.mark.slow
def test_copies_are_summed_over_their_axis_by_the_piece():
    paper = traced("hsdp/8", 1024, _DENSE)
    reduced, summed = (
        paper.traffic["reduce-scatter", "shard"],
        paper.traffic["all-reduce", "replicate"],
    )
    whole = 4 * sum(shape.numel() for shape in paper.shapes.values())
    assert reduced.sent == whole * 7 / 8
    assert summed.sent == 2 * whole / 8 * 127 / 128
    assert paper.state == traced("hsdp/8", 16, _DENSE).state


@pytest.mark.nightly
@pytest.mark.parametrize("setup", ["fsdp", "fsdp_ep/4"])
def test_the_last_rank_does_what_the_first_does(setup):
    first, last = traced(setup, 1024), traced(setup, 1024, rank=1023)
    assert first.traffic == last.traffic
    assert all(last.state[name] <= size for name, size in first.state.items())


def test_a_model_that_cannot_be_sharded_so_is_reported():
    with pytest.raises(Exception, match="tensor_parallel"):
        traced("fsdp_tp/4", 16)
    assert not dist.is_initialized()


def calls_of(work: Callable[[], object]) -> int:
    """How many functions ``work`` calls, those of C included."""
    count = itertools.count()

    def note(_frame: Any, event: str, _argument: Any) -> None:
        if event in ("call", "c_call"):
            next(count)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(count)


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees", [{}, {"replicate": 8}, {"tensor": 8}, {"context": 2, "tensor": 4, "expert": 8}]
)
def test_meshes_take_work_and_memory_by_the_rank_at_most(degrees):
    def calls_and_blocks(world_size: int) -> tuple[int, int]:
        kept = []

        def make() -> None:
            others = math.prod(degrees.values()) // degrees.get("expert", 1)
            shard = world_size // others
            kept.append(make_meshes(ParallelDims(world_size, shard=shard, **degrees)))

        with fake_group(Launch(world_size, 0, 0, 8)):
            # What earlier tests left must not be freed in between.
            gc.collect()
            before = sys.getallocatedblocks()
            calls = calls_of(make)
            gc.collect()
            return calls, sys.getallocatedblocks() - before

    calls_and_blocks(64)  # what is made once
    (calls, blocks), (more_calls, more_blocks) = calls_and_blocks(128), calls_and_blocks(512)
    # Four times the ranks; by their square it would be sixteen.
    assert more_calls < 5 * calls
    # Python keeps the numbers up to 256; of the others each list of all ranks has its own.
    assert more_blocks < 5 * blocks + 8 * 512


@pytest.mark.slow
def test_a_save_is_counted_in_entries_of_all_ranks():
    paper = traced("hsdp/8", 16)
    one, four = (save_cost(paper.items, world_size) for world_size in (16, 64))
    assert one.entries == 16 * len(paper.items)
    assert four.entries == 4 * one.entries
    assert four.plan_bytes == pytest.approx(one.plan_bytes * 63 / 15)
    assert one.metadata > 50 * one.entries


def test_a_beat_costs_the_board_the_same_on_any_number_of_ranks():
    few, many = store_cost(8), store_cost(1024)
    assert few.heartbeat == many.heartbeat <= 3
    assert many.failure >= 1
