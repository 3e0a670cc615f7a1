"""What ranks agree on, and that no rank waits for one that failed."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from modtrain.common.errors import CheckpointError, DataError, RankError
from modtrain.distributed.launch import Launch
from modtrain.distributed.process_group import Ranks, init_ranks
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks


def _tells() -> tuple[object, ...]:
    ranks = Ranks.create()
    total = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(total)
    return (
        ranks.rank,
        ranks.broadcast_from_rank0(f"by {ranks.rank}"),
        ranks.all_gather_object(ranks.rank * 10),
        ranks.any(ranks.rank == 1),
        float(total),
    )


@pytest.mark.slow
def test_ranks_get_the_same_outcome():
    assert on_ranks(_tells, 3) == [(rank, "by 0", [0, 10, 20], True, 6.0) for rank in range(3)]


def _runs_on_rank0() -> list[str]:
    ranks = Ranks.create().duplicate()
    results = [ranks.run_on_rank0(lambda: f"made by {ranks.rank}")]
    for error in (CheckpointError("full"), ValueError("odd")):

        def fail(error: Exception = error) -> str:
            raise error

        try:
            ranks.run_on_rank0(fail)
        except Exception as raised:
            results.append(f"{type(raised).__name__}: {raised}")
    return results


def test_what_rank_0_does_alone_is_known_to_all():
    first, second = on_ranks(_runs_on_rank0, 2)
    assert first == ["made by 0", "CheckpointError: full", "ValueError: odd"]
    assert second[0] == "made by 0"
    assert [text.rpartition(": ")[2] for text in second[1:]] == ["full", "odd"]
    assert all(text.startswith("RankError: rank 0 on ") for text in second[1:])


def test_one_process_agrees_with_itself():
    ranks = Ranks.create()
    assert (ranks.world_size, ranks.rank, ranks.group) == (1, 0, None)
    assert ranks.broadcast_from_rank0(3) == 3
    assert ranks.all_gather_object("x") == ["x"]
    with pytest.raises(DataError), ranks.raise_on_all_ranks():
        raise DataError("gone")


def _fails_on_one() -> str:
    ranks = Ranks.create()
    try:
        with ranks.raise_on_all_ranks():
            if ranks.rank == 1:
                raise DataError("the shard is gone")
    except DataError:
        return "own"
    except RankError as error:
        return str(error)
    return "none"


def test_an_error_on_one_rank_is_raised_on_all():
    first, second, third = on_ranks(_fails_on_one, 3)
    assert second == "own"
    for message in (first, third):
        assert message.startswith("rank 1 on ") and message.endswith("the shard is gone")


_SAVE_TIMEOUT = timedelta(minutes=30)


def _makes_a_group_with_a_dead_rank(is_for_saves: bool) -> None:
    launch = Launch.from_environment()
    with init_ranks(launch, "cpu", timedelta(seconds=2), needs_group=True) as ranks:
        if launch.rank == 1:
            os._exit(7)
        # Without a timeout as those of meshes and of DeepSpeed, for which torch has half an hour.
        _ = ranks.duplicate(_SAVE_TIMEOUT) if is_for_saves else dist.new_group([0, 1])


@pytest.mark.parametrize("is_for_saves", [False, True])
def test_no_group_is_waited_for_longer_than_the_timeout(is_for_saves):
    waiting, dead = outcomes_on_ranks(
        _makes_a_group_with_a_dead_rank, 2, is_for_saves, timeout=30, joins=False
    )
    assert "exit code 7" in str(dead)
    assert isinstance(waiting, RankFailedError)


def _timeouts() -> list[timedelta]:
    launch = Launch.from_environment()
    with init_ranks(launch, "cpu", timedelta(seconds=77), needs_group=True) as ranks:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("one", "two"))
        groups = [mesh.get_group("one"), mesh.get_group("two"), dist.new_group([0, 1])]
        groups += [ranks.group, ranks.duplicate(_SAVE_TIMEOUT).group]
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_every_group_has_the_timeout():
    expected = [timedelta(seconds=77)] * 4 + [_SAVE_TIMEOUT]
    assert on_ranks(_timeouts, 2, joins=False) == [expected] * 2
