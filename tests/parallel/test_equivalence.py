"""Models spread over ranks compute, learn and decide as one process does, in every layout.

A covering array: each layout meets each model, and each of both meets each option.
"""

import contextlib
import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import checkpoint_path
from modtrain.checkpoint.state import named_state, restore
from modtrain.common.ignored_target import IGNORED
from modtrain.data.stream.batch import Batch
from modtrain.distributed.process_group import Ranks
from modtrain.evaluation.held_out import Part, evaluate
from modtrain.models.depth.config import ComputeBudget
from modtrain.models.transformer import Transformer, is_predictor
from modtrain.parallel.config import LayerOptions
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.grad_clip import clip
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.parallelize import parallelize
from tests.helpers.model_cases import MODELS, distinct_tokens, settle
from tests.helpers.near import assert_near
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import assert_trains_alike
from tests.helpers.saved import newest_weights, tensors_of

# What stands in a layout's name is what is above 1.
LAYOUTS = {
    "shard2": ParallelDims(2, shard=2),
    "tensor2": ParallelDims(2, tensor=2),
    "context2": ParallelDims(2, context=2),
    "context2 expert2": ParallelDims(2, context=2, expert=2),
    "shard4": ParallelDims(4, shard=4),
    "context4": ParallelDims(4, context=4),
    "shard2 context2": ParallelDims(4, shard=2, context=2),
    "shard4 expert4": ParallelDims(4, shard=4, expert=4),
    "shard4 expert2": ParallelDims(4, shard=4, expert=2),
    "shard2 context2 expert4": ParallelDims(4, shard=2, context=2, expert=4),
    "shard2 tensor2": ParallelDims(4, shard=2, tensor=2),
    "shard2 tensor2 expert2": ParallelDims(4, shard=2, tensor=2, expert=2),
    "context2 tensor2": ParallelDims(4, context=2, tensor=2),
    "replicate2 shard2": ParallelDims(4, replicate=2, shard=2),
    "replicate2 tensor2": ParallelDims(4, replicate=2, tensor=2),
    "replicate2 context2": ParallelDims(4, replicate=2, context=2),
    "replicate2 shard2 expert2": ParallelDims(4, replicate=2, shard=2, expert=2),
    "shard2 context2 tensor2": ParallelDims(8, shard=2, context=2, tensor=2),
    "shard2 context2 tensor2 expert2": ParallelDims(8, shard=2, context=2, tensor=2, expert=2),
    "replicate2 shard2 tensor2 expert2": ParallelDims(8, 2, shard=2, tensor=2, expert=2),
    "replicate2 context2 tensor2 expert2": ParallelDims(8, 2, context=2, tensor=2, expert=2),
}


class Option(NamedTuple):
    """How a run differs from the next one beside its model."""

    checkpointing: str
    length: int
    has_documents: bool


# No length but the last divides; of three tokens some ranks have padding alone.
OPTIONS = [
    Option("none", 19, has_documents=False),
    Option("selective", 19, has_documents=True),
    Option("none", 3, has_documents=False),
    Option("full", 19, has_documents=False),
    Option("none", 19, has_documents=True),
    Option("none", 16, has_documents=False),
]
_MICRO_BATCHES, _STEPS, _LIMIT = 4, 3, 0.5


def _fits(model: str, layout: str) -> bool:
    return MODELS[model].experts.count is not None or LAYOUTS[layout].expert == 1


ARRAY = {
    (layout, model): OPTIONS[(row + column) % len(OPTIONS)]
    for row, layout in enumerate(LAYOUTS)
    for column, model in enumerate(MODELS)
    if _fits(model, layout)
}
# One of each kind in the commit tier: every degree, every model, with every other degree.
QUICK = {
    "shard2": ["dense", "mod"],
    "context2 expert2": ["staged", "expert choice"],
    "shard2 tensor2 expert2": ["integrated", "separately routed parts"],
    "replicate2 context2": ["mod in a window", "routed without a router"],
    "shard4 expert2": ["narrow expert choice", "mostly no-ops"],
    "replicate2 context2 tensor2 expert2": ["limited experts"],
    "shard2 context2 tensor2": ["mod", "kept keys"],
}


@dataclass
class Trace:
    """What a few steps came to: micro-batches by number; gradients are the first step's."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    auxiliary: dict[int, dict[str, float]] = field(default_factory=dict)
    chosen: dict[int, list[Any]] = field(default_factory=dict)
    experts: dict[int, list[Any]] = field(default_factory=dict)
    gradients: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def _micro_batch(option: Option, number: int) -> tuple[Any, ...]:
    """Two sequences, some of whose targets are left out, and documents of uneven lengths."""
    tokens_BT = distinct_tokens(2, option.length + 1, number)
    targets_BS = tokens_BT[:, 1:].clone()
    targets_BS[0, option.length // 2 : option.length // 2 + 1 + number % 2] = IGNORED
    documents_BS = None
    if option.has_documents:
        place_S = torch.arange(option.length)
        documents_BS = torch.stack([place_S // 4, (place_S + 3) // 7])
    return tokens_BT[:, :-1], targets_BS, documents_BS


def _whole(tensors: Any) -> dict[str, Any]:
    # Not as tensors, which a process could not send and end.
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().copy()
        for name, value in tensors
        if value is not None
    }


def _optimizer(model: Transformer) -> torch.optim.Optimizer:
    # Of gradients near zero Adam makes steps of full length, and rounding would decide their sign.
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
    groups = [{"params": params} for params in groups]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, fused=True)


def _step(
    model: Transformer, own: list[int], option: Option, mean: Any, trace: Trace, precision: Any
) -> None:
    loss, seen = torch.zeros(()), torch.zeros(1)
    for place, number in enumerate(own):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(place == len(own) - 1)
        tokens_BS, targets_BS, documents_BS = _micro_batch(option, number)
        with _autocast(precision):
            output = model(tokens_BS, targets_BS, documents_BS=documents_BS)
        (sum(output.auxiliary.values(), start=output.loss) / len(own)).backward()
        loss += output.loss.detach() / len(own)
        observed = model.batch_stats(output)
        seen = seen + torch.cat([torch.zeros(1), *(value.flatten() for value in observed)])
        trace.auxiliary[number] = {k: float(v.detach()) for k, v in output.auxiliary.items()}
        trace.chosen[number] = [record.chosen_BS.tolist() for record in output.routing]
        trace.experts[number] = [
            (record.executed_E.tolist(), record.load.tolist(), float(record.dropped))
            for record in output.experts
        ]
    trace.losses.append(float(mean(loss)))
    if not trace.gradients:
        trace.gradients = _whole((name, p.grad) for name, p in model.named_parameters())
    by_kind: list[list[Any]] = [[], []]
    for name, parameter in model.named_parameters():
        by_kind[is_predictor(name)].append(parameter)
    trace.norms += [float(clip(parameters, _LIMIT)) for parameters in by_kind]
    pieces = mean(seen / len(own))[1:].split([value.numel() for value in observed])
    model.update_running_stats(
        [piece.view_as(v) for piece, v in zip(pieces, observed, strict=True)]
    )


def _autocast(precision: str) -> Any:
    is_narrow = precision == "bf16"
    return torch.autocast("cpu", torch.bfloat16) if is_narrow else contextlib.nullcontext()


def _learn(
    model: Transformer, rank: int, size: int, option: Option, mean: Any, precision: str = "fp32"
) -> Trace:
    trace, optimizer = Trace(), _optimizer(model)
    per_rank = _MICRO_BATCHES // size
    for step in range(_STEPS):
        first = step * _MICRO_BATCHES + rank * per_rank
        _step(model, list(range(first, first + per_rank)), option, mean, trace, precision)
        optimizer.step()
        optimizer.zero_grad()
    trace.state = _whole(model.state_dict().items())
    return trace


@functools.cache
def _in_one_process(model: str, option: Option, precision: str = "fp32") -> Trace:
    return _learn(Transformer(MODELS[model]), 0, 1, option, lambda x: x, precision)


def _on_a_rank(layout: str, runs: list[tuple[str, Option]], options: dict[str, Any]) -> list[Trace]:
    dims = LAYOUTS[layout]
    meshes = make_meshes(dims)

    def mean(x: Any) -> Any:
        x = x.clone()
        dist.all_reduce(x)
        return x / dims.world_size

    traces = []
    for name, option in runs:
        model = Transformer(MODELS[name])
        names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
        layers = LayerOptions(activation_checkpointing=option.checkpointing, **options)
        for _ in range(2):  # the second does nothing
            parallelize(model, meshes, layers)
        assert [n for n, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        rank, size = meshes.dims.data_rank(dist.get_rank()), meshes.dims.data_parallel
        traces.append(_learn(model, rank, size, option, mean, layers.precision))
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return traces


def _assert_alike(actual: Trace, wanted: Trace) -> None:
    for number, chosen in actual.chosen.items():
        assert chosen == wanted.chosen[number], f"micro-batch {number}"
        assert_near(actual.auxiliary[number], wanted.auxiliary[number], f"micro-batch {number}")
        pairs = zip(actual.experts[number], wanted.experts[number], strict=True)
        for (executed, *ours), (other_executed, *theirs) in pairs:
            assert executed == other_executed
            for one, other in zip(ours, theirs, strict=True):
                assert one == pytest.approx(other)
    assert_near(actual.gradients, wanted.gradients, "gradients")
    assert actual.losses == pytest.approx(wanted.losses, abs=1e-5)
    assert actual.norms == pytest.approx(wanted.norms, abs=1e-5)
    assert_near(actual.state, wanted.state, "state")


def _assert_learns_alike(
    layout: str, models: list[str], timeout: float = 120, **options: Any
) -> None:
    dims = LAYOUTS[layout]
    runs = [(model, ARRAY[layout, model]) for model in models]
    copies = dims.context * dims.tensor
    ranks = on_ranks(_on_a_rank, dims.world_size, layout, runs, options, timeout=timeout)
    for place, case in enumerate(runs):
        wanted = _in_one_process(*case, options.get("precision", "fp32"))
        assert wanted.norms[0] > _LIMIT, "nothing would be clipped"
        seen: set[int] = set()
        for rank, traces in enumerate(ranks):
            try:
                _assert_alike(traces[place], wanted)
            except AssertionError as error:
                error.add_note(f"{case} on rank {rank} of {layout}")
                raise
            assert traces[place].chosen == ranks[rank // copies * copies][place].chosen
            seen |= traces[place].chosen.keys()
        assert seen == wanted.chosen.keys()


@pytest.mark.parametrize(
    ("layout", "models"),
    [
        # A few seconds each.
        pytest.param(layout, models, marks=[] if number < 2 else pytest.mark.slow, id=layout)
        for number, (layout, models) in enumerate(QUICK.items())
    ],
)
def test_learns_as_one_process(layout, models):
    _assert_learns_alike(layout, models)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_model_learns_as_one_process(layout):
    models = [m for m in MODELS if _fits(m, layout) and m not in QUICK.get(layout, [])]
    _assert_learns_alike(layout, models, timeout=800)


def test_every_pair_is_covered():
    for model, option in itertools.product(MODELS, OPTIONS):
        assert any(o == option for (_, m), o in ARRAY.items() if m == model), (model, option)
    for layout, option in itertools.product(LAYOUTS, OPTIONS):
        assert option in {o for (other, _), o in ARRAY.items() if other == layout}
    assert {model for models in QUICK.values() for model in models} == set(MODELS)


@pytest.mark.slow
def test_bf16_is_what_autocast_makes_of_a_whole_model():
    """What is gathered narrow, autocast would have cast; nothing that decides is."""
    _assert_learns_alike("shard2", ["mod", "staged"], precision="bf16")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor2", "context2"])
def test_bf16_is_near(layout):
    option = ARRAY[layout, "mod"]
    wanted = _in_one_process("mod", option, "bf16")
    options = {"precision": "bf16"}
    for (actual,) in on_ranks(_on_a_rank, 2, layout, [("mod", option)], options):
        assert actual.losses == pytest.approx(wanted.losses, abs=0.03)
        assert actual.losses != pytest.approx(wanted.losses, abs=1e-6)
        assert actual.norms == pytest.approx(wanted.norms, rel=0.1, abs=0.01)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        *((layout, "staged") for layout in ("shard2", "replicate2 shard2", "context2")),
        ("shard2 context2 tensor2", "mod"),
        ("replicate2 tensor2", "mod in a window"),
        ("shard2 tensor2 expert2", "limited experts"),
        ("context2 expert2", "expert choice"),
    ],
)
def test_compiled_layers_learn_alike(layout, model):
    _assert_learns_alike(layout, [model], timeout=800, compile=True)


# Evaluation.

_LENGTH = 19


def _evaluation_batches() -> Any:
    return distinct_tokens(4, _LENGTH + 1, 9).split(1)


def _evaluates(layout: str, model_name: str, budgets: Any) -> Any:
    dims = LAYOUTS[layout]
    meshes = make_meshes(dims)
    model = settle(Transformer(MODELS[model_name]), _LENGTH)
    parallelize(model, meshes, LayerOptions())

    def total(x: Any) -> Any:
        dist.all_reduce(x)
        return x * dims.data_parallel / dims.world_size

    batches = _evaluation_batches()[dims.data_rank(dist.get_rank()) :: dims.data_parallel]
    parts = {"": Part(map(Batch.from_tokens, batches), total)}
    evaluated = evaluate(model, parts, contextlib.nullcontext(), budgets=budgets)
    # Saved or clipped after it, a model is in its pieces.
    assert all(isinstance(value, DTensor) for value in model.parameters())
    return evaluated


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("shard2 context2", "mod"),
        ("shard2 tensor2 expert2", "separately routed parts"),
        ("context2 tensor2", "separately routed parts"),
        ("shard4 expert4", "mostly no-ops"),
    ],
)
def test_evaluates_as_one_process(layout, model):
    budgets = {"predictor": ComputeBudget(step_cap=1, layer_cap=0.4)}
    whole = settle(Transformer(MODELS[model]), _LENGTH)
    parts = {"": Part(map(Batch.from_tokens, _evaluation_batches()))}
    wanted = evaluate(whole, parts, contextlib.nullcontext(), budgets=budgets)
    shares = [s for d in wanted.decisions.values() for s in d.realised_capacity.values()]
    assert any(0 < share < 1 for share in shares), "all tokens take part, or none"
    for actual in on_ranks(_evaluates, LAYOUTS[layout].world_size, layout, model, budgets):
        assert actual.tokens == wanted.tokens
        for decision, ours in [*actual.decisions.items(), ("top_k", actual.top_k)]:
            theirs = wanted.top_k if decision == "top_k" else wanted.decisions[decision]
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
            assert ours.flops == pytest.approx(theirs.flops)
            assert ours.realised_capacity == theirs.realised_capacity
            assert ours.agreement == theirs.agreement
            for layer, load in theirs.expert_load.items():
                assert ours.expert_load[layer] == pytest.approx(load)


# Checkpoints.


def _passes_on(layout: str | None, model_name: str, given: Path | None, path: Path) -> None:
    """Restore ``given``, or make a first step, and save; nothing is trained in between."""
    model = Transformer(MODELS[model_name], seed=0 if given is None else 1)
    if layout is not None:
        parallelize(model, make_meshes(LAYOUTS[layout]), LayerOptions())
    optimizer = _optimizer(model)
    if given is None:
        tokens_BS, targets_BS, _ = _micro_batch(OPTIONS[0], 0)
        model(tokens_BS, targets_BS).loss.backward()
        optimizer.step()
    with Checkpointer(Ranks.create()) as checkpointer:
        if given is not None:
            restore(given, model, optimizer, checkpointer.ranks)
        tensors, rest = named_state(model, optimizer)
        checkpointer.save(path, tensors, rest, 1)


def _assert_checkpoints_cross(layouts: list[str | None], model: str, root: Path) -> None:
    given = None
    for number, layout in enumerate(layouts):
        folder = root / str(number)
        folder.mkdir()
        path = checkpoint_path(folder, 1)
        world_size = 1 if layout is None else LAYOUTS[layout].world_size
        on_ranks(_passes_on, world_size, layout, model, given, path)
        tensors = tensors_of(path)
        wanted = tensors if given is None else tensors_of(given)
        assert tensors.keys() == wanted.keys() and any("exp_avg" in key for key in tensors)
        assert not [key for key, value in wanted.items() if not torch.equal(value, tensors[key])]
        given = path


@pytest.mark.slow
def test_checkpoints_cross_layouts(tmp_path):
    layouts = ["shard2 tensor2 expert2", "context2 tensor2", None, "replicate2 shard2 expert2"]
    _assert_checkpoints_cross(layouts, "separately routed parts", tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["mod", "staged"])
def test_checkpoints_cross_all_layouts(tmp_path, model):
    layouts = [layout for layout in LAYOUTS if _fits(model, layout)]
    _assert_checkpoints_cross([*layouts, None, *layouts[:1]], model, tmp_path)


# Whole runs, by Lightning.

FAMILIES = {
    "mod": ["model.router.causal=[predictor,threshold]"],
    "dense": ["model.pattern=dense"],
    "staged": ["model.experts.count=4", "model.experts.balance=bias"],
    "integrated": ["model.experts.count=4", "model.experts.noop=2", "model.pattern=dense"],
}
# Processes, strategy, and families in the commit tier.
RUNS = {
    "ddp": (2, [], ["mod", "dense"]),
    "fsdp": (2, [], ["mod", "dense"]),
    "hsdp": (4, ["shard_size=2"], []),
    "fsdp_tp": (2, [], []),
    "fsdp_ep": (4, [], []),
    "fsdp_cp": (4, ["context_parallel=2"], []),
    "fsdp +tp+cp": (4, ["tensor_parallel=2", "context_parallel=2"], ["mod"]),
    "fsdp +tp+ep": (4, ["tensor_parallel=2", "expert_parallel=2"], []),
    "fsdp +cp+ep": (4, ["context_parallel=2", "expert_parallel=4"], ["staged"]),
    "hsdp +tp": (4, ["shard_size=1", "tensor_parallel=2"], []),
    "hsdp +cp+ep": (4, ["shard_size=1", "context_parallel=2", "expert_parallel=2"], []),
    "deepspeed_1": (2, [], []),
    "deepspeed_2": (2, [], ["staged"]),
    "deepspeed_3": (2, [], []),
}


def _cases() -> list[Any]:
    return [
        pytest.param(
            name,
            family,
            marks=[] if family in RUNS[name][2] else pytest.mark.nightly,
            id=f"{name}-{family}",
        )
        for name in RUNS
        for family in FAMILIES
        if "ep" not in name.replace("deepspeed", "") or family in ("staged", "integrated")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), _cases())
def test_a_run_is_that_of_one_process(prepared, tmp_path, name, family):
    """Its data, seeds, clipping, accumulation, evaluation and checkpoints."""
    world_size, keys, _ = RUNS[name]
    more = [f"strategy={name.split()[0]}", *(f"strategy.{key}" for key in keys)]
    assert_trains_alike(prepared, tmp_path, world_size, FAMILIES[family], more, 5e-5)
    wanted, actual = (newest_weights(tmp_path / name, 4) for name in ("one", "many"))
    assert_near(actual, wanted, atol=1e-4)
