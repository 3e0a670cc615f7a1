"""A training step asks for no number that a device would first have to finish.

Run on the CPU under a watch for what waits on a device. modtrain's own operators are opaque to it:
what they do inside depends on the device, and is no part of what is watched here.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.cli.compose import compose
from modtrain.data.stream.batch import PADDING, Batch
from modtrain.distributed.launch import Launch
from modtrain.distributed.process_group import Ranks
from modtrain.models.depth.layer import MixtureOfDepths
from modtrain.models.depth.router import LinearRouter
from modtrain.models.transformer import Transformer
from modtrain.parallel.strategies.base import make_strategy
from modtrain.training.callbacks.guard import FiniteLossGuard
from modtrain.training.callbacks.metrics import MetricsCallback, StepClock
from modtrain.training.hardware import resolve_precision
from modtrain.training.module import LanguageModule
from modtrain.training.plan import resolve, strategy_options
from modtrain.training.run import make_trainer
from tests.helpers.marks import slow_but

aten = torch.ops.aten
STEPS = 4
WAITS = {
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy),
    *(aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive),
    *(aten.repeat_interleave, aten.bincount),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# On the CPU these read memory without an operator.
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class WaitedError(AssertionError):
    """Something asked for a number, or for a shape that depends on numbers."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "modtrain":
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        packet = func.overloadpacket
        masks = packet in INDEXED and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        if packet in WAITS or masks:
            raise WaitedError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        devices = {leaf.device for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)}
        # A scalar on the CPU may take part in what a device computes; nothing else may.
        if len(devices) > 1:
            raise WaitedError(f"{func} copies between {devices}")
        return result


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_cpu = func is Tensor.to and any(arg == "cpu" for arg in args if isinstance(arg, str))
        if func in READS or to_cpu:
            raise WaitedError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Watches batches from their start to the end of every callback behind it but the last's.

    It stands first and last among the callbacks (``closing``): in the last step, where a record is
    due that has to wait, it ends before them.
    """

    def __init__(self) -> None:
        self.modes = ExitStack()
        self.steps = 0

    def on_train_batch_start(self, *_args: Any) -> None:
        self.modes.enter_context(_Functions())
        self.modes.enter_context(_Operators())

    def on_train_batch_end(self, trainer: L.Trainer, *_args: Any) -> None:
        if trainer.global_step == STEPS:
            self.modes.close()

    def on_exception(self, *_args: Any) -> None:
        self.modes.close()

    @property
    def closing(self) -> L.Callback:
        watch = self

        class Closing(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_args: Any) -> None:
                watch.steps = trainer.global_step
                watch.modes.close()

        return Closing()


class Records:
    """In place of the log: keeps what is written."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, step: int, _values: dict[str, float]) -> None:
        self.written.append(step)


@pytest.fixture
def step(tiny, tmp_path: Path):
    """Train four steps of two micro-batches under the watch."""

    def run(*more: str, has_padding: bool = False) -> LanguageModule:
        overrides = [f"budget.steps={STEPS}", "name=watched", f"runs_dir={tmp_path}", *more]
        config, plan = resolve(compose("train", [*tiny, *overrides]))
        assert plan.accumulate == 2
        L.seed_everything(0, verbose=False)
        module = LanguageModule(config, plan)
        watch, records = Watch(), Records()
        ranks = Ranks.create()
        checkpointer = Checkpointer(ranks)
        guard = FiniteLossGuard(None, None, [STEPS], checkpointer, ranks)
        metrics = MetricsCallback(records, StepClock(), STEPS, "fp32", ranks)
        callbacks = [watch, guard, metrics, watch.closing]
        precision = resolve_precision(config.precision, "cpu")
        config = replace(config, precision=precision)
        strategy = make_strategy(strategy_options(config, plan), "cpu", checkpointer)
        trainer = make_trainer(config, plan, strategy, Launch(), callbacks)
        vocabulary = config.model.vocabulary
        tokens = torch.randint(vocabulary, (2 * STEPS, 2, plan.seq_len + 1))
        if has_padding:
            tokens[:, 0, plan.seq_len // 2 :] = PADDING
        batches = [Batch.from_tokens(own, has_padding=has_padding) for own in tokens]
        if has_padding:
            batches = [batch._replace(weight=0.7) for batch in batches]
        try:
            trainer.fit(module, DataLoader(batches, batch_size=None))
        finally:
            watch.modes.close()
        assert (watch.steps, records.written) == (STEPS, [STEPS])
        return module

    return run


EXPERTS = ("model.experts.count=3", "model.experts.dim=8")
VARIANTS = {
    "dense": ["model.pattern=dense"],
    "top-k": [],
    "every decision": ["model.router.causal=[auxiliary,predictor,threshold]"],
    "both parts": ["model.router.target=both", "model.router.causal=[threshold]"],
    "attention's router": ["model.router.target=attention"],
    "MLP's router": ["model.router.target=mlp"],
    "MLP score": ["model.router.score=mlp"],
    "attention score": ["model.router.score=attention"],
    "fixed score": ["model.router.score=fixed"],
    "random score": ["model.router.score=random"],
    "oracle score": ["model.router.score=oracle_norm"],
    "sigmoid gate": ["model.router.gate=sigmoid", "model.router.gate_scale=true"],
    "tanh gate": ["model.router.gate=tanh"],
    "no gate": ["model.router.gate=none"],
    "token choice": ["model.router.choice=token"],
    "documents": ["data.document_mask=true"],
    "token choice, documents": ["model.router.choice=token", "data.document_mask=true"],
    "convolution, documents": ["model.mixer=convolution", "data.document_mask=true"],
    "window": ["model.sliding_window=9"],
    "experts": [*EXPERTS, "model.pattern=dense", "model.experts.noop=1", "model.experts.shared=1"],
    "one expert": [*EXPERTS, "model.experts.top_k=1"],
    "limited experts": [*EXPERTS, "model.experts.capacity_factor=0.7"],
    "balance bias": [*EXPERTS, "model.experts.balance=bias"],
    "expert choice": [*EXPERTS, "model.experts.choice=expert", "model.experts.noop=1"],
    "loss by chunks": ["model.loss_chunk=24"],
    "schedule": ["capacity_schedule=linear", "capacity_schedule.levels=3"],
    "no clipping": ["optimizer.grad_clip=null"],
    "selective": ["strategy.activation_checkpointing=selective", *EXPERTS],
    "full": ["strategy.activation_checkpointing=full", "model.router.choice=token"],
    "bf16": ["precision=bf16", *EXPERTS],
}


# Together the quick ones go through every way to choose and to mix.
QUICK = (
    *("every decision", "attention score", "oracle score", "token choice, documents"),
    *("convolution, documents", "experts", "limited experts", "balance bias", "expert choice"),
    "schedule",
)


@pytest.mark.on_commit(6)
@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
def test_a_step_waits_for_nothing(step, name):
    model = step(*VARIANTS[name]).model
    # Absorbing was watched too: it happened.
    parts = [part for part in (*model.routers, *model.mixtures) if part.has_running_stats]
    states = [buffer for part in parts for buffer in part.buffers(recurse=False)]
    assert any(state.any() for state in states) == bool(states)


PADDED = {
    "every decision": VARIANTS["every decision"],
    "token choice": VARIANTS["token choice"],
    "experts": VARIANTS["experts"],
    "expert choice": VARIANTS["expert choice"],
    "attention score": VARIANTS["attention score"],
}


@pytest.mark.on_commit("every decision", "expert choice")
@pytest.mark.parametrize("name", slow_but(("every decision",), PADDED))
def test_a_step_with_padding_waits_for_nothing(step, name):
    step(*PADDED[name], has_padding=True)


ASKS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool(x.sum() > 0),
    "index": lambda x: range(9)[x[0, 0].long().clamp(0, 8)],
    "mask": lambda x: x[x > 0],
    "written mask": lambda x: x.detach().clone().__setitem__(x > 0, 0.0),
    "written mask of tensors": lambda x: x.detach().clone().__setitem__(x > 0, x.new_zeros(1)),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x.unique(dim=0),
    "equal": lambda x: torch.equal(x, x),
    "repeats": lambda x: x.repeat_interleave(x.new_ones(2).long(), dim=0),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "other device": lambda x: x.to("meta"),
    "item in backward": lambda x: x.register_hook(lambda grad: grad * grad.sum().item()),
}


@pytest.mark.on_commit("item", "mask", "list", "item in backward")
@pytest.mark.parametrize("ask", slow_but(("item", "mask", "list", "item in backward"), ASKS))
def test_the_watch_sees_a_router_that_asks(step, monkeypatch, ask):
    original = LinearRouter.forward

    def forward(router: LinearRouter, x_BSD: Tensor) -> Tensor:
        scores_BS = original(router, x_BSD)
        ASKS[ask](scores_BS)
        return scores_BS

    monkeypatch.setattr(LinearRouter, "forward", forward)
    with pytest.raises(WaitedError):
        step()


@pytest.mark.on_commit(3)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Transformer, "batch_stats"),
        (MixtureOfDepths, "update_running_stats"),
        (torch.optim.AdamW, "step"),
        (LanguageModule, "configure_gradient_clipping"),
        (FiniteLossGuard, "on_step_end"),
        (MetricsCallback, "on_step_end"),
    ],
)
def test_the_watch_sees_every_part_of_a_step(step, monkeypatch, owner, name):
    original = getattr(owner, name)

    def waiting(*args: Any, **kwargs: Any) -> Any:
        torch.zeros(()).item()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, waiting)
    with pytest.raises(WaitedError):
        step("model.router.causal=[threshold]")


def test_a_causal_decision_waits_so_training_must_not_take_it(step, monkeypatch):
    original = Transformer.forward

    def forward(model: Transformer, *args: Any, **kwargs: Any) -> Any:
        return original(model, *args, selection="predictor", **kwargs)

    monkeypatch.setattr(Transformer, "forward", forward)
    with pytest.raises(WaitedError, match="waits for the device"):
        step()
