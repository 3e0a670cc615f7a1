"""One rank of a large run on paper: the real trainer over tensors without memory.

torch's fake process group takes any number of ranks and sends nothing; fake tensors have shapes and
no numbers. What is run is what a run has: strategy, module, Lightning's trainer, clipping, AdamW.
What it would send is noted operator by operator.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import modtrain.parallel.expert
from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.parts import parts_of
from modtrain.cli.compose import compose
from modtrain.data.stream.batch import Batch
from modtrain.distributed.launch import Launch
from modtrain.distributed.process_group import Ranks
from modtrain.parallel.config import dims_of
from modtrain.parallel.meshes import Meshes
from modtrain.parallel.strategies.base import make_strategy
from modtrain.parallel.strategies.fsdp import FSDPStrategy
from modtrain.training.config import TrainConfig
from modtrain.training.module import LanguageModule
from modtrain.training.plan import TrainingPlan, resolve, strategy_options
from modtrain.training.run import make_trainer

del modtrain.parallel.expert  # for its operator alone

ALL = "all"
"""The name of the group that all ranks are in."""

# The second step is like all that follow; in the first FSDP and AdamW make what they keep.
_STEPS = 2
_NODE = 8


class Traffic(NamedTuple):
    """What collectives of one kind over one axis come to. sent: bytes that this rank sends."""

    number: int
    sent: float


@dataclass
class Paper:
    """What one rank does in a step, and what it keeps.

    traffic: by kind of collective and axis; bytes sent as by the algorithms that `_sent` names.
    sizes: ranks of each axis's group. operators: what the step dispatches but for
    views. state: bytes
    of parameters, gradients and optimizer state. shapes: of the whole model's parameters by name.
    items: what of a checkpoint falls to the rank.
    """

    config: TrainConfig
    plan: TrainingPlan
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    operators: int = 0
    state: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    items: list[WriteItem] = field(default_factory=list)


def trace(world_size: int, rank: int, seq_len: int, overrides: Sequence[str]) -> Paper:
    """Run ``rank`` of ``world_size`` through two steps of a micro-batch each; return the second.

    seq_len: tokens of the one sequence of a micro-batch. overrides: of `modtrain train`: the model,
    the strategy and its groups, the precision.

    Raises:
        ConfigError: such a model cannot be trained so.
    """
    local = math.gcd(world_size, _NODE)
    launch = Launch(world_size, rank, rank % local, local)
    # Before there is a group: no rank saves here, and there is nothing to agree on.
    checkpointer = Checkpointer(Ranks.create())
    with fake_group(launch), tempfile.TemporaryDirectory() as folder:
        config, plan = _resolved(launch, seq_len, Path(folder), overrides)
        strategy = make_strategy(strategy_options(config, plan), "cpu", checkpointer)
        if not isinstance(strategy, FSDPStrategy):
            raise TypeError(f"strategy={config.strategy.name} does not cut parameters")
        paper = Paper(config, plan)
        axes = groups_of(strategy.meshes)
        # Last, for it may be an axis as well.
        axes[ALL] = [torch.distributed.distributed_c10d._get_default_group()]
        paper.sizes = {name: groups[0].size() for name, groups in axes.items()}
        with _without_memory(), _Counting(axes) as counting:
            module = LanguageModule(config, plan)
            paper.shapes = {name: p.shape for name, p in module.model.named_parameters()}
            trainer = make_trainer(config, plan, strategy, launch, [_Notes(paper, counting)])
            trainer.fit(module, _Batches(seq_len))
    return paper


def _resolved(
    launch: Launch, seq_len: int, folder: Path, overrides: Sequence[str]
) -> tuple[TrainConfig, TrainingPlan]:
    common = {
        "name": "paper",
        "runs_dir": folder / "runs",
        "data.path": folder / "data",
        "data.seq_len": seq_len,
        "strategy.accelerator": "cpu",
        "budget.steps": _STEPS,
        "batch.micro_batch_size": 1,
        "batch.tokens": launch.world_size * seq_len,
    }
    lines = [f"{key}={value}" for key, value in common.items()]
    config: TrainConfig = compose("train", [*lines, *overrides])
    # Of a group that reads the same data each rank has a micro-batch, but the group one.
    dims = dims_of(config.strategy, config.model, launch)
    config.batch.tokens = dims.data_parallel * seq_len
    return resolve(config, needs_data=False, launch=launch)


@contextmanager
def fake_group(launch: Launch) -> Iterator[None]:
    with mock.patch.dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT="1"):
        launch.export()
        dist.init_process_group(
            "fake", store=FakeStore(), rank=launch.rank, world_size=launch.world_size
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _without_memory() -> Iterator[None]:
    make = DeviceMesh.__init__

    def make_real(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        # It reads its own rank's place from a tensor.
        with unset_fake_temporarily():
            make(self, *args, **kwargs)

    with (
        mock.patch.object(DeviceMesh, "__init__", make_real),
        mock.patch.object(_fsdp_param, "_chunk_with_empty", _Pieces),
        # Before training only; no other rank runs, so a rank keeps its own value.
        mock.patch.object(dist, "broadcast_object_list", lambda *_args, **_kwargs: None),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


class _Pieces:
    """A tensor's pieces, made when they are asked for.

    FSDP makes a view for every rank of every parameter and takes two. That is nothing for real
    tensors, and most of the time for fake ones.
    """

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self.tensor, self.dim = tensor, dim
        self.size = -(-tensor.shape[dim] // num_chunks)

    def __getitem__(self, number: int) -> Tensor:
        start = number * self.size
        length = min(self.size, self.tensor.shape[self.dim] - start)
        if length <= 0:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, length)


def groups_of(meshes: Meshes) -> dict[str, list[ProcessGroup]]:
    """Return this rank's process groups by the axis that they are of."""
    groups: dict[str, list[ProcessGroup]] = {}
    every = (meshes.layers, meshes.root, meshes.tensor, meshes.context, meshes.expert)
    for mesh in filter(None, (*every, meshes.experts)):
        for axis in mesh.mesh_dim_names or ():
            groups.setdefault(axis, []).append(mesh.get_group(axis))
    return groups


class _Batches:
    """One sequence a step."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def __len__(self) -> int:
        return _STEPS

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(_STEPS):
            yield Batch.from_tokens(torch.zeros(1, self.seq_len + 1, dtype=torch.long))


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is dispatched, collectives by kind and axis."""

    def __init__(self, axes: Mapping[str, Sequence[ProcessGroup]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {
            # Groups of all ranks are one, whatever the axes.
            group.group_name: ALL if group.size() == axes[ALL][0].size() else name
            for name, groups in axes.items()
            for group in groups
        }
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.operators = 0
        self.number: Counter[tuple[str, str]] = Counter()
        self.sent: defaultdict[tuple[str, str], float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        # Where experts' matrices are put together a view is made for every rank: that costs little.
        self.operators += not func.is_view and func.namespace != "prim"
        if func.namespace in ("c10d", "_c10d_functional", "modtrain"):
            self._note(str(func).rpartition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "_c10d_functional.wait_tensor" or (
            # Others of modtrain's own compute.
            name.startswith("modtrain.") and name not in _OPERATORS
        ):
            return
        kind, place, num_bytes = _OPERATORS[name]
        group = args[place]
        group = (
            _resolve_process_group(GroupName(group))
            if isinstance(group, str)
            else ProcessGroup.unbox(group)
        )
        key = kind, self._names[group.group_name]
        self.number[key] += 1
        self.sent[key] += sent(kind, num_bytes(args, group.size()), group.size())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Of each operator the kind, the place of its group among the arguments, and the bytes of what is
# whole: what a gather ends with, and what a reduction or an exchange begins with.
_OPERATORS: Mapping[str, tuple[str, int, Callable[[tuple[Any, ...], int], int]]] = {
    "c10d._allgather_base_": ("all-gather", 2, lambda args, _: _bytes(args[0])),
    "c10d._reduce_scatter_base_": ("reduce-scatter", 2, lambda args, _: _bytes(args[1])),
    "c10d.allreduce_": ("all-reduce", 1, lambda args, _: sum(map(_bytes, args[0]))),
    "c10d.broadcast_": ("broadcast", 1, lambda args, _: sum(map(_bytes, args[0]))),
    "c10d.barrier": ("barrier", 1, lambda *_: 0),
    "_c10d_functional.all_gather_into_tensor": (
        "all-gather",
        2,
        lambda args, size: _bytes(args[0]) * size,
    ),
    "_c10d_functional.reduce_scatter_tensor": (
        "reduce-scatter",
        3,
        lambda args, _: _bytes(args[0]),
    ),
    "_c10d_functional.all_reduce": ("all-reduce", 2, lambda args, _: _bytes(args[0])),
    "modtrain.exchange": ("all-to-all", 4, lambda args, _: _bytes(args[0][: sum(args[2])])),
}


def sent(kind: str, whole: float, size: int) -> float:
    """Bytes that a rank sends of ``whole`` bytes in a group of ``size``, by rings and directly.

    What a ring sends is also the least that a rank has to (Patarasuk and Yuan 2009).
    """
    turns = {"all-reduce": 2, "barrier": 0}.get(kind, 1)
    return turns * whole * (size - 1) / size


class _Notes(L.Callback):
    """Takes down the last step."""

    def __init__(self, paper: Paper, counting: _Counting) -> None:
        self.paper, self.counting = paper, counting

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin a step."""
        self.counting.clear()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        """Keep what it came to."""
        counting, paper = self.counting, self.paper
        paper.operators = counting.operators
        paper.traffic = {
            key: Traffic(number, counting.sent[key])
            for key, number in sorted(counting.number.items())
        }
        parameters = list(module.model.parameters())
        own = sum(_bytes(_local(p)) for p in parameters)
        optimizer = trainer.optimizers[0]
        kept = (v for state in optimizer.state.values() for v in state.values())
        paper.state = {
            "parameters": own,
            # They are let go of by now.
            "gradients": sum(_bytes(_local(p)) for p in parameters if p.requires_grad),
            "optimizer": sum(_bytes(_local(v)) for v in kept if v.ndim),
        }
        tensors = trainer.strategy.named_state()[0]  # type: ignore[attr-defined]
        with unset_fake_temporarily():
            # It reads where pieces lie from tensors.
            parts = parts_of(tensors, dist.get_rank(), dist.get_world_size())
        paper.items = [part.item for part in parts]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
