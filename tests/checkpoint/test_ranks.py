"""State by name, saved and restored by real ranks in every layout; what fails on one fails all."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import Manifest, checkpoint_path
from modtrain.checkpoint.parts import parts_of
from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.recovery import latest, recover
from modtrain.checkpoint.state import load_weights, model_tensors, named_state, restore
from modtrain.common.errors import CheckpointError, ModtrainError
from modtrain.distributed.process_group import Ranks
from tests.helpers.ranks import RankFailedError, on_ranks, outcomes_on_ranks
from tests.helpers.saved import flip_bit, load_whole

# Sizes that no number of ranks here divides.
WIDTH, HIDDEN = 7, 11


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(13, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.embedding(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def layout(model: nn.Module, name: str) -> nn.Module:
    """Lay the model out as a strategy does."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if name == "ddp":
        return DistributedDataParallel(model)
    if name == "compiled":
        model.layers[0] = torch.compile(model.layers[0], backend="eager")
        return model
    if name in ("fsdp", "hsdp"):
        shape, names = ((world,), ("shard",)) if name == "fsdp" else ((2, world // 2), ("r", "s"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def model_and_optimizer(name: str, seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW]:
    model = layout(Net(seed), name)
    # Fused keeps the count of steps on the device, and wants what it gets there.
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.01, fused=name != "single")


def train(model: nn.Module, optimizer: torch.optim.AdamW, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(int(model_tensors(model)["state_dict.seen"]))
        tokens = torch.randint(13, (4, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model_tensors(model)["state_dict.seen"].add_(1)
        losses.append(loss.item())
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def full_state(model, optimizer) -> dict[str, list]:
    """As plain lists: a rank that ends takes tensors that it shares with it."""
    tensors = named_state(model, optimizer)[0]
    return {key: whole(value).tolist() for key, value in tensors.items()}


def saves(root: str, name: str) -> tuple[dict[str, list], list[float]]:
    """Train 3 steps, save beside 2 more, and return the state at 3 and the losses after it."""
    ranks = Ranks.create()
    model, optimizer = model_and_optimizer(name)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.007
    checkpointer = Checkpointer(ranks)
    state = full_state(model, optimizer)
    tensors, extra_state = named_state(model, optimizer)
    own = {"rank": ranks.rank, "random": torch.arange(ranks.rank + 1)}
    path = checkpoint_path(Path(root), 3)
    checkpointer.save(path, tensors, {**extra_state, "progress": {"tokens": 72}}, 3, own)
    losses = train(model, optimizer, 2)
    checkpointer.close()
    return state, losses


def restores(root: str, name: str) -> tuple:
    ranks = Ranks.create()
    model, optimizer = model_and_optimizer(name, seed=1)
    step, path = recover(Path(root), ranks)
    restored = restore(path, model, optimizer, ranks)
    assert (step, restored.step, restored.extra_state["progress"]) == (3, 3, {"tokens": 72})
    state = full_state(model, optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    own = restored.rank_state
    own = own and {**own, "random": own["random"].tolist()}
    return state, train(model, optimizer, 2), own, restored.world_size, rates


def run(function, world: int, *arguments):
    return on_ranks(function, world, *arguments) if world > 1 else [function(*arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp", 2), ("fsdp", 2)),
        (("ddp", 2), ("fsdp", 4)),
        (("fsdp", 4), ("ddp", 2)),
        (("hsdp", 4), ("single", 1)),
        (("single", 1), ("hsdp", 4)),
        (("compiled", 1), ("fsdp", 2)),
    ],
)
def test_state_comes_back_bitwise_in_any_layout(tmp_path, before, after):
    state, losses = run(saves, before[1], str(tmp_path), before[0])[0]
    outcomes = run(restores, after[1], str(tmp_path), after[0])
    for rank, (restored, later, own, world, rates) in enumerate(outcomes):
        assert restored == state
        assert later == pytest.approx(losses, abs=1e-5)
        assert world == before[1]
        assert rates == [0.007, 0.01]
        if before[1] == after[1]:
            assert own == {"rank": rank, "random": list(range(rank + 1))}
        else:
            assert own is None
    if before == after:
        assert outcomes[0][1] == losses


def shares(name: str) -> tuple[list[str], int, int]:
    """Keys and bytes that this rank writes, and bytes of everything."""
    model, optimizer = model_and_optimizer(name)
    train(model, optimizer, 1)
    tensors = named_state(model, optimizer)[0]
    parts = parts_of(tensors, dist.get_rank(), dist.get_world_size())
    keys = [f"{part.item.index.fqn} {list(part.item.index.offset)}" for part in parts]
    return keys, sum(p.tensor.nbytes for p in parts), sum(whole(t).nbytes for t in tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("ddp", 2), ("hsdp", 4), ("fsdp", 4)])
def test_each_rank_writes_its_share_and_nothing_twice(name, world):
    outcomes = on_ranks(shares, world, name)
    keys = [key for own, _, _ in outcomes for key in own]
    assert len(keys) == len(set(keys))
    total = outcomes[0][2]
    assert sum(own for _, own, _ in outcomes) == total
    assert max(own for _, own, _ in outcomes) < 1.5 * total / world


def spread(root: str, axis: int) -> bool:
    """Tensor-parallel pieces beside plain tensors, saved on this mesh, read on one turned round."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    value = torch.arange(5 * 9.0).view(5, 9)
    saved = distribute_tensor(value, mesh, [Replicate(), Shard(axis)])
    path = checkpoint_path(Path(root), axis)
    with Checkpointer(Ranks.create()) as checkpointer:
        checkpointer.save(path, {"state_dict.w": saved, "state_dict.b": torch.ones(3)}, {}, axis)
    into = distribute_tensor(torch.zeros(5, 9), mesh, [Shard(1 - axis), Replicate()])
    TensorReader(path).into({"state_dict.w": into})
    return torch.equal(into.full_tensor(), value)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_of_any_mesh(tmp_path, axis):
    assert on_ranks(spread, 4, str(tmp_path), axis) == [True] * 4
    read, _ = load_whole(checkpoint_path(tmp_path, axis))
    assert torch.equal(read["state_dict.w"], torch.arange(45.0).view(5, 9))


def each_its_own(root: str) -> list[str]:
    ranks = Ranks.create()
    path = checkpoint_path(Path(root), 1)
    own = {f"state_dict.{n}": torch.full((3,), float(n)) for n in range(7) if n % 2 == ranks.rank}
    with Checkpointer(ranks) as checkpointer:
        checkpointer.save(path, own, {}, 1, deduplicate=False)
    reader = TensorReader(path)
    return [f"{key} {value.tolist()}" for key, value in sorted(reader.items())]


def test_ranks_may_give_other_keys_each(tmp_path):
    expected = [f"state_dict.{n} {[float(n)] * 3}" for n in range(7)]
    assert on_ranks(each_its_own, 2, str(tmp_path)) == [expected] * 2


def polls(root: str) -> int:
    """Count polls of a save that rank 0 ends later than the other."""
    from modtrain.checkpoint import checkpointer as module

    if dist.get_rank() == 0:
        module.prune = lambda *_: time.sleep(0.5)
    checkpointer = Checkpointer(Ranks.create(), keep_last=1)
    small(checkpointer, Path(root), 1)
    count = 0
    while checkpointer.poll():
        count += 1
        time.sleep(0.01)
    return count


def test_ranks_hear_of_the_end_at_the_same_poll(tmp_path):
    first, second = on_ranks(polls, 2, str(tmp_path))
    assert first == second > 1


class Products(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)


def tensor_parallel(seed: int) -> nn.Module:
    """Columns, then rows, over one axis; sharded over the other: strided pieces."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(Products(seed), mesh["model"], plan)
    return fully_shard(model, mesh=mesh["data"])


def saves_2d(root: str) -> None:
    with Checkpointer(Ranks.create()) as checkpointer:
        tensors, extra_state = named_state(tensor_parallel(3))
        checkpointer.save(checkpoint_path(Path(root), 1), tensors, extra_state, 1)


def restores_2d(root: str) -> dict[str, list]:
    ranks, model = Ranks.create(), tensor_parallel(4)
    restore(checkpoint_path(Path(root), 1), model, ranks=ranks)
    return {key: whole(value).tolist() for key, value in model.state_dict().items()}


def test_tensor_parallel_pieces_that_are_sharded_again(tmp_path):
    on_ranks(saves_2d, 4, str(tmp_path))
    expected = {key: value.tolist() for key, value in Products(3).state_dict().items()}
    model = Products(4)
    restore(checkpoint_path(tmp_path, 1), model)
    assert {key: value.tolist() for key, value in model.state_dict().items()} == expected
    assert on_ranks(restores_2d, 4, str(tmp_path)) == [expected] * 4


# What goes wrong --------------------------------------------------------------------------------


def small(checkpointer: Checkpointer, root: Path, step: int, size: int = 10, **options) -> Path:
    path = checkpoint_path(root, step)
    checkpointer.save(
        path, {"w": torch.arange(float(size)), "v": torch.ones(size)}, {}, step, **options
    )
    return path


def fails_on_one(root: str, how: str) -> tuple[str, list[str], tuple[int, str]]:
    """Save 1 well, let 2 fail on rank 1, save 3 well."""
    ranks, folder = Ranks.create(), Path(root)
    checkpointer = Checkpointer(ranks)
    small(checkpointer, folder, 1)
    checkpointer.wait()
    fsync = os.fsync

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    if ranks.rank == 1 and how == "disk":
        os.fsync = full
    if ranks.rank == 1 and how == "memory":
        checkpointer._staging.copy = lambda *_: torch.empty(2**60)
    size = 12 if ranks.rank == 1 and how == "tensors" else 10
    small(checkpointer, folder, 2, size)
    try:
        while checkpointer.poll():
            time.sleep(0.01)
        message = ""
    except CheckpointError as error:
        message = str(error)
    os.fsync = fsync
    vars(checkpointer._staging).pop("copy", None)
    names = sorted(path.name for path in folder.iterdir())
    small(checkpointer, folder, 3)
    checkpointer.close()
    return message, names, recover(folder, ranks)


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ("disk", "rank 1: .*No space left"),
        ("memory", r"rank 1: .*(memory|negative|overflow)"),
        ("tensors", "rank 1 .* other tensors"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_and_the_next_save_works(tmp_path, how, pattern):
    for message, names, newest in on_ranks(fails_on_one, 2, str(tmp_path), how):
        assert re.search(pattern, message), message
        assert ("repair the disk" in message) == (how != "tensors")
        assert names == ["step-000000001"]
        assert newest == (3, tmp_path / "step-000000003")


def dies_in_a_save(root: str) -> str:
    ranks, folder = Ranks.create(), Path(root)
    checkpointer = Checkpointer(ranks, timeout=timedelta(seconds=2))
    small(checkpointer, folder, 1, blocking=True)
    if ranks.rank == 1:
        from modtrain.checkpoint import writing

        writing._HashingStream.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    small(checkpointer, folder, 2)
    try:
        checkpointer.wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_rank_killed_in_a_save_leaves_the_one_before(tmp_path):
    start = time.monotonic()
    outcomes = outcomes_on_ranks(dies_in_a_save, 3, str(tmp_path), timeout=30)
    assert time.monotonic() - start < 20
    assert isinstance(outcomes[1], RankFailedError)
    assert "could not be written" in outcomes[0]
    assert "could not be written" in outcomes[2]
    assert recover(tmp_path) == (1, tmp_path / "step-000000001")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def recovers(root: str) -> tuple:
    """What is found, and which files this rank read."""
    from modtrain.checkpoint import layout

    ranks, read = Ranks.create(), []
    sha = layout.file_sha256
    layout.file_sha256 = lambda file: (read.append(f"{file.parent.name}/{file.name}"), sha(file))[1]
    return latest(Path(root), ranks), recover(Path(root), ranks), read


def saved_by_two(root: str, *steps: int) -> None:
    with Checkpointer(Ranks.create()) as checkpointer:
        for step in steps:
            small(checkpointer, Path(root), step)


def test_each_rank_reads_its_share_of_the_files(tmp_path):
    on_ranks(saved_by_two, 2, str(tmp_path), 1)
    newest = (1, tmp_path / "step-000000001")
    first, second = on_ranks(recovers, 2, str(tmp_path))
    assert first[:2] == second[:2] == (newest, newest)
    files = {f"step-000000001/{n}" for n in Manifest.read(newest[1]).files}
    assert len(files) == 4
    assert len(first[2]) == len(second[2]) == 4  # twice two
    assert set(first[2]) | set(second[2]) == files


@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "state.pt", "all"])
def test_damage_that_one_rank_finds_is_known_to_all(tmp_path, file):
    on_ranks(saved_by_two, 2, str(tmp_path), 1, 2)
    hurt = tmp_path / "step-000000002"
    for path in hurt.iterdir() if file == "all" else [hurt / file]:
        flip_bit(path)
    for recovered in on_ranks(recovers, 2, str(tmp_path)):
        assert recovered[:2] == ((1, tmp_path / "step-000000001"),) * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged-step-000000002",
        "step-000000001",
    ]


def sees_another_disk(root: str) -> tuple | None:
    """Rank 1's directory is its own: an empty one of the same name."""
    ranks = Ranks.create()
    if ranks.rank == 1:
        exists = Path.is_file
        Path.is_file = lambda self: "step-000000002" not in str(self) and exists(self)
    return recover(Path(root), ranks)


def test_a_directory_that_one_rank_does_not_see_is_passed_over_by_all(tmp_path):
    on_ranks(saved_by_two, 2, str(tmp_path), 1, 2)
    assert on_ranks(sees_another_disk, 2, str(tmp_path)) == [(1, tmp_path / "step-000000001")] * 2


def restores_another_model(root: str) -> str:
    ranks = Ranks.create()
    model = Net()
    if ranks.rank == 1:
        model.extra = nn.Linear(2, 2)
    try:
        restore(checkpoint_path(Path(root), 3), model, None, ranks)
    except ModtrainError as error:
        return f"{type(error).__name__}: {error}"
    return "restored"


def test_missing_and_unexpected_names_are_reported(tmp_path):
    saves(str(tmp_path), "single")
    first, second = on_ranks(restores_another_model, 2, str(tmp_path))
    assert first.startswith("RankError: rank 1")
    assert "lacks state_dict.extra.bias, state_dict.extra.weight" in second
    path = checkpoint_path(tmp_path, 3)
    model = Net()
    model.layers = model.layers[:1]
    with pytest.raises(CheckpointError, match=r"contains state_dict\.layers\.1\.0\.b.* not have"):
        restore(path, model)
    model = Net()
    model.layers[1][0] = nn.Linear(WIDTH, HIDDEN + 1)
    with pytest.raises(CheckpointError, match=r"layers\.1\.0\.\w+ of shape"):
        restore(path, model)
    fewer = torch.optim.AdamW(model_and_optimizer("single")[0].parameters())
    with pytest.raises(ValueError, match="does not have"):
        restore(path, Net(), fewer)


def test_groups_that_do_not_fit_are_refused(tmp_path):
    saves(str(tmp_path), "single")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="other groups of parameters: "):
        restore(checkpoint_path(tmp_path, 3), model, optimizer)


def test_a_parameter_that_never_had_a_gradient_has_no_state_and_gets_none(tmp_path):
    model, optimizer = model_and_optimizer("single")
    model.layers[1].requires_grad_(False)
    train(model, optimizer, 1)
    tensors, extra_state = named_state(model, optimizer)
    path = checkpoint_path(tmp_path, 1)
    with Checkpointer(Ranks.create()) as checkpointer:
        checkpointer.save(path, tensors, extra_state, 1)
    again, fresh = model_and_optimizer("single", seed=1)
    train(again, fresh, 1)
    restore(path, again, fresh)
    assert full_state(again, fresh) == full_state(model, optimizer)
    assert not fresh.state.get(again.layers[1][0].weight)


def test_load_weights_reads_no_optimizer_state(tmp_path, monkeypatch):
    state, _ = saves(str(tmp_path), "single")
    path = checkpoint_path(tmp_path, 3)
    asked = []
    into = TensorReader.into
    monkeypatch.setattr(
        TensorReader, "into", lambda self, tensors: (asked.extend(tensors), into(self, tensors))[1]
    )
    model = Net(seed=1)
    load_weights(path, model)
    for key, tensor in model_tensors(model).items():
        assert tensor.tolist() == state[key]
    assert all(key.startswith("state_dict.") for key in asked)
    assert model.head.weight is model.embedding.weight
