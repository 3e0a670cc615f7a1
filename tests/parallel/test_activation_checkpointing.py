"""Activation checkpointing changes memory alone: not losses, gradients, draws or names.

Shapes: B batch, S sequence, K chosen, D model, H heads.
"""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from modtrain.models.config import ModelConfig, RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.transformer import Transformer
from modtrain.parallel import activation_checkpointing

MODES = ["none", "selective", "full"]
WIDTH, LENGTH = 16, 48


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Context(NamedTuple):
    """As a model's: tensors, plain values, and nothing."""

    positions_BS: Tensor
    selection: str = "top_k"
    window: int | None = None
    documents_BS: Tensor | None = None


class Record(NamedTuple):
    scores_BS: Tensor
    chosen_BS: Tensor
    predictor_BS: Tensor | None = None


class Output(NamedTuple):
    value_BSD: Tensor
    routing: tuple[Record, ...] = ()


class Layer(nn.Module):
    """What a routed block consists of, in few lines: choice, attention, an MLP and noise."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.router = nn.Parameter(torch.randn(WIDTH))
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x_BSD: Tensor, context: Context, *, scale: float = 1.0) -> Output:
        scores_BS = x_BSD @ self.router
        index_BK = scores_BS.topk(LENGTH // 2).indices.sort(dim=1).values
        gathered_BKD = index_BK.unsqueeze(-1).expand(-1, -1, WIDTH)
        x_BKD = self.norm(x_BSD.gather(1, gathered_BKD))
        x_BKD = x_BKD + context.positions_BS.gather(1, index_BK).unsqueeze(-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x_BKD).chunk(3, -1))
        mixed_BHKW = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y_BKD = x_BKD + mixed_BHKW.transpose(1, 2).flatten(2)
        y_BKD = y_BKD + self.noise * torch.randn_like(y_BKD) * y_BKD
        y_BKD = self.factor * scale * self.down(F.silu(self.up(y_BKD)))
        y_BKD = y_BKD * scores_BS.gather(1, index_BK).unsqueeze(-1)
        value_BSD = x_BSD.scatter_add(1, gathered_BKD, y_BKD.to(x_BSD.dtype))
        chosen_BS = torch.zeros_like(scores_BS, dtype=torch.bool).scatter(1, index_BK, True)
        return Output(value_BSD, (Record(scores_BS, chosen_BS),))


class Model(nn.Module):
    def __init__(self, noise: float = 0.5, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(noise) for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, tuple[Record, ...]]:
        positions_BS = torch.linspace(0, 1, LENGTH).expand(x_BSD.shape[0], -1)
        records: tuple[Record, ...] = ()
        for layer in self.layers:
            found = layer(x_BSD, Context(positions_BS), scale=0.5)
            x_BSD, records = found.value_BSD, records + found.routing
        scores = torch.stack([record.scores_BS.sigmoid().mean() for record in records])
        return self.head(x_BSD).square().mean() + 0.1 * scores.sum(), records


def made(mode: str, **options) -> Model:
    torch.manual_seed(0)
    model = Model(**options)
    activation_checkpointing.apply(model, mode)
    return model


def inputs() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def step(model: Model, call=None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients by name, and the next draw from the global generator."""
    torch.manual_seed(2)
    loss, _ = (model if call is None else call)(inputs())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients, torch.randn(3)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_losses_gradients_and_draws_are_bitwise_the_same(mode, autocast):
    found = []
    for model in (made("none"), made(mode)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found.append(step(model))
    (loss, gradients, draw), (expected_loss, expected_gradients, expected_draw) = found
    assert torch.equal(loss, expected_loss)
    assert torch.equal(draw, expected_draw)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
        assert gradient.any(), name


@pytest.mark.parametrize("mode", MODES)
def test_names_and_state_are_those_of_the_bare_model(mode):
    bare, model = made("none"), made(mode)
    for method in ("named_parameters", "named_buffers", "state_dict"):
        expected, found = dict(getattr(bare, method)()), dict(getattr(model, method)())
        assert list(found) == list(expected)
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name])
    # The wrapper has the name of what it wraps.
    names = dict.fromkeys(n for n, _ in model.named_modules())
    assert list(names) == [n for n, _ in bare.named_modules()]
    wrapped = {type(module) for module in model.modules()} - {type(m) for m in bare.modules()}
    assert len(wrapped) == (mode != "none")
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.add_(1)
    model.load_state_dict(bare.state_dict())
    bare.load_state_dict(model.state_dict())
    for name, parameter in bare.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert model.layers[0].noise == 0.5
    assert not model.eval().layers[0].norm.training
    assert len(list(copy.deepcopy(model).parameters())) == len(list(bare.parameters()))


class Alive(TorchDispatchMode):
    """Knows the storages that operations made, and which of them are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.storages.values() if not ref.expired())


def kept_bytes(mode: str) -> int:
    """Bytes that a forward pass leaves behind for its backward pass."""
    model = made(mode)
    with Alive() as alive:
        loss, _ = model(inputs())
    kept = alive.bytes()
    loss.backward()
    return kept


def test_each_mode_keeps_less_than_the_one_before():
    none, selective, full = (kept_bytes(mode) for mode in MODES)
    assert selective < 0.8 * none
    assert full < 0.4 * none


def backward_flops(mode: str) -> int:
    loss, _ = made(mode)(inputs())
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_selective_repeats_no_product_and_full_repeats_what_it_must():
    none, selective, full = (backward_flops(mode) for mode in MODES)
    assert selective == none
    assert full > 1.2 * none


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_selective_repeats_norms_but_neither_attention_nor_choices():
    loss, _ = made("selective")(inputs())
    with Operations() as seen:
        loss.backward()
    repeated = " ".join(seen.names)
    assert "aten::silu " in repeated
    assert "aten::topk" not in repeated
    assert "aten::sort" not in repeated
    assert "flash_attention_for_cpu " not in repeated


def test_selective_keeps_the_results_of_modtrains_own_operations():
    calls = []

    @torch.library.custom_op("modtrain::checkpointing_test", mutates_args=())
    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    double.register_autograd(lambda _context, gradient: 2 * gradient)

    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x.sin()).square()

    model = nn.Module()
    model.layers = nn.ModuleList([Doubling()])
    activation_checkpointing.apply(model, "selective")
    x = torch.ones(3, requires_grad=True)
    model.layers[0](x).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, 8 * x.detach().sin() * x.detach().cos())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_model_that_learns_nothing_runs_as_ever(mode):
    with torch.no_grad():
        torch.manual_seed(2)
        loss, records = made(mode)(inputs())
        torch.manual_seed(2)
        expected, _ = made(mode)(inputs())
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert all(record.chosen_BS.sum() == LENGTH for record in records)


@pytest.mark.slow
@pytest.mark.on_commit(1)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_step_compiles_to_one_graph_equal_to_eager(mode, backend):
    # Inductor draws otherwise than eager code: without noise they compare.
    model = made(mode, noise=0.0 if backend == "inductor" else 0.5, num_layers=2)
    loss, gradients, _ = step(model)
    model.zero_grad()
    counter = CompileCounterWithBackend(backend)
    call = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    compiled_loss, compiled_gradients, _ = step(model, call)
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-5)


TRANSFORMERS = {
    "dense": {"pattern": "dense"},
    "drawing": {"router": RouterConfig(score="random")},
    "by attention": {"router": RouterConfig(score="attention")},
    "with state": {"router": RouterConfig(target="both", causal=["threshold", "predictor"])},
    "experts": {"experts": ExpertsConfig(count=4, noop=1, balance="bias")},
}


def transformer_step(name: str, mode: str, backend: str | None = None) -> dict[str, Tensor]:
    """Losses, gradients and running states of one step, by name."""
    shape = {"d_model": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 48, "d_ff": 32}
    config = ModelConfig(**shape, capacity=0.25, init_std=0.2, **TRANSFORMERS[name])
    model = Transformer(config)
    activation_checkpointing.apply(model, mode)
    call = model
    if backend is not None:
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    tokens_BS = torch.randint(48, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    output = call(tokens_BS[:, :-1], tokens_BS[:, 1:])
    losses = {"loss": output.loss, **output.auxiliary}
    torch.stack(list(losses.values())).sum().backward()
    model.update_running_stats(model.batch_stats(output))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses | gradients | {name: b + 0 for name, b in model.named_buffers()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_learns_bitwise_the_same_in_every_mode(name):
    expected = transformer_step(name, "none")
    for mode in ("selective", "full"):
        found = transformer_step(name, mode)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_compiles_to_one_graph_in_every_mode(name, mode):
    expected, found = transformer_step(name, "none"), transformer_step(name, mode, "aot_eager")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_a_mode_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="none, selective, full, not partial"):
        activation_checkpointing.apply(Model(), "partial")
