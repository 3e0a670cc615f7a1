"""Sequences shared out over ranks are computed, learned from and routed as in one process."""

import contextlib
import functools
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.distributed.collectives import Group
from modtrain.distributed.launch import Launch
from modtrain.evaluation.held_out import evaluate
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.compute_budget import ComputeBudget
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.loss import IGNORED
from modtrain.models.transformer import Transformer, is_predictor
from modtrain.parallel import fsdp as parallelize
from modtrain.parallel.config import LayerOptions, StrategyConfig, sizes_of
from modtrain.parallel.context import Shares, share_sequences
from modtrain.parallel.grad_clip import clip
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.validation import size_problems
from modtrain.training.metrics_log import read_metrics
from modtrain.training.run import train
from tests.helpers.model_cases import distinct_tokens, settle, small
from tests.helpers.ranks import on_ranks

_CAUSAL = ["predictor", "auxiliary", "threshold"]
_CASES = {
    "dense": small(pattern="dense", num_heads=4, num_kv_heads=2, num_layers=2),
    "window": small(pattern="dense", num_layers=2, sliding_window=4, tie_embeddings=True),
    "mod": small(
        tie_embeddings=True,
        qk_norm=True,
        router=RouterConfig(causal=_CAUSAL, predictor_dim=8, gate="sigmoid", gate_scale=True),
    ),
    "mod in a window": small(
        num_layers=2, capacity=0.6, sliding_window=5, router=RouterConfig(gate="tanh")
    ),
    "parts routed apart": small(
        num_layers=3,
        mixer=["convolution", "attention", "convolution"],
        activation="gelu",
        pattern=[1, 0.3, 0.3],
        router=RouterConfig(target="both", score="mlp", hidden_dim=6, causal=_CAUSAL),
        experts=ExpertsConfig(count=4, top_k=2, dim=8, every=2),
    ),
    "routed without a router": small(
        num_layers=4,
        pattern=[1, 0.3, 1, 0.5],
        router=RouterConfig(score="oracle_norm", gate="none", causal=["predictor"]),
    ),
    "staged mode": small(
        num_layers=2,
        router=RouterConfig(choice="token"),
        # No expert can get just a fifth of the tokens: its bias would move as rounding wills.
        experts=ExpertsConfig(count=5, top_k=1, dim=12, shared=1, balance="bias"),
    ),
    "limited experts": small(
        num_layers=2,
        capacity=0.5,
        experts=ExpertsConfig(count=3, top_k=2, dim=8, capacity_factor=0.9, balance="loss"),
    ),
    "integrated mode": small(
        num_layers=2,
        pattern="dense",
        experts=ExpertsConfig(count=3, top_k=2, dim=8, noop=1, choice="expert"),
    ),
}
# World size, and ranks of a context group.
_LAYOUTS = {"1x1": (1, 1), "1x2": (2, 2), "1x4": (4, 4), "2x2": (4, 2)}
_BATCHES, _STEPS, _LIMIT = 2, 2, 0.5


@dataclass
class _Trace:
    """What a few steps came to; gradients are the first step's, the state the last one's."""

    losses: list[float] = field(default_factory=list)
    auxiliary: list[dict] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    chosen: list[list] = field(default_factory=list)
    loads: list = field(default_factory=list)
    gradients: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)


def _batches(length, step, with_documents):
    """Two micro-batches of two sequences, some of whose targets are left out."""
    for number in range(_BATCHES):
        tokens_BT = distinct_tokens(2, length + 1, 10 * step + number)
        targets_BS = tokens_BT[:, 1:].clone()
        targets_BS[0, length // 2 : length // 2 + 1 + number] = IGNORED
        documents_BS = None
        if with_documents:
            # Of uneven lengths, other ones in each sequence.
            place_S = torch.arange(length)
            documents_BS = torch.stack([place_S // 4, (place_S + 3) // 7])
        yield tokens_BT[:, :-1], targets_BS, documents_BS


def _optimizer(model):
    # Of gradients near zero Adam makes steps of full length, and rounding would decide their sign.
    parameters = list(model.parameters())
    groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
    groups = [{"params": params} for params in groups]
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, fused=True)


def _whole(tensors):
    # Not as tensors, which a process could not send and end.
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().copy()
        for name, value in tensors.items()
        if value is not None
    }


def _learns(model, batches, mean, precision=None):
    """Train on ``batches``, a list a step; thresholds and biases move by what each has seen."""
    trace, optimizer = _Trace(), _optimizer(model)
    for own in batches:
        loss, seen = 0.0, 0
        for tokens_BS, targets_BS, documents_BS in own:
            with precision or contextlib.nullcontext():
                output = model(tokens_BS, targets_BS, documents_BS=documents_BS)
            (sum(output.auxiliary.values(), start=output.loss) / len(own)).backward()
            loss += output.loss.detach() / len(own)
            trace.auxiliary.append({k: float(v.detach()) for k, v in output.auxiliary.items()})
            observed = model.batch_stats(output)
            seen += torch.cat([torch.zeros(1), *(value.flatten() for value in observed)])
            trace.chosen.append([record.chosen_BS.tolist() for record in output.routing])
            trace.loads.append(
                [
                    (r.executed_E.tolist(), r.load_E.tolist(), float(r.dropped))
                    for r in output.experts
                ]
            )
        trace.losses.append(float(mean(loss)))
        trace.gradients = trace.gradients or _whole(
            {name: parameter.grad for name, parameter in model.named_parameters()}
        )
        by_kind = [[], []]
        for name, parameter in model.named_parameters():
            by_kind[is_predictor(name)].append(parameter)
        trace.norms += [float(clip(parameters, _LIMIT)) for parameters in by_kind]
        optimizer.step()
        optimizer.zero_grad()
        pieces = mean(seen / len(own))[1:].split([value.numel() for value in observed])
        model.update_running_stats(
            [piece.view_as(v) for piece, v in zip(pieces, observed, strict=True)]
        )
    trace.state = _whole(model.state_dict())
    return trace


@functools.cache
def _in_one_process(case, length, with_documents):
    batches = [list(_batches(length, step, with_documents)) for step in range(_STEPS)]
    return _learns(Transformer(_CASES[case]), batches, lambda x: x)


def _mean(x):
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def _on_a_rank(context, runs, options=None, autocast=False):
    meshes = make_meshes("fsdp_cp", dist.get_world_size(), context_parallel=context)
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else None
    traces = []
    for case, length, with_documents in runs:
        model = Transformer(_CASES[case])
        names = [name for name, _ in model.named_parameters()]
        keys = list(model.state_dict())
        for _ in range(2):  # the second does nothing
            parallelize.fsdp_cp(model, meshes, options or LayerOptions())
        assert [name for name, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        batches = [
            list(_batches(length, step, with_documents))[meshes.data_rank :: meshes.data_size]
            for step in range(_STEPS)
        ]
        traces.append((meshes.data_rank, _learns(model, batches, _mean, precision)))
    return traces


def _same(found, wanted, atol=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=atol), name


def _assert_learns_alike(layout, runs, options=None, timeout=120):
    world_size, context = _LAYOUTS[layout]
    copies = world_size // context
    for traces in on_ranks(_on_a_rank, world_size, context, runs, options, timeout=timeout):
        for run, (rank, found) in zip(runs, traces, strict=True):
            wanted = _in_one_process(*run)
            assert wanted.norms[0] > _LIMIT, "nothing would be clipped"
            # Every rank has the records of the whole sequences that its group reads.
            assert found.chosen == wanted.chosen[rank::copies], run
            for ours, theirs in zip(found.loads, wanted.loads[rank::copies], strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert one[0] == other[0]
                    assert one[1] == pytest.approx(other[1])
                    assert one[2] == pytest.approx(other[2])
            for ours, theirs in zip(found.auxiliary, wanted.auxiliary[rank::copies], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            assert found.losses == pytest.approx(wanted.losses, abs=1e-5)
            _same(found.gradients, wanted.gradients)
            assert found.norms == pytest.approx(wanted.norms, abs=1e-5)
            _same(found.state, wanted.state)


# No length divides: a rank's late piece is padding, in part or all of it.
_RUNS = [
    *[(layout, case, 19, False) for layout in _LAYOUTS for case in _CASES],
    *[("1x2", case, 19, True) for case in _CASES],
    # Some ranks have padding alone, of the sequence or of the chosen; and none have any.
    *[
        ("1x4", case, 3, False)
        for case in ("dense", "mod", "parts routed apart", "limited experts")
    ],
    *[("1x2", case, 16, False) for case in ("dense", "mod", "integrated mode")],
]
_QUICK = [
    *[("1x2", case, 19, True) for case in ("mod", "parts routed apart", "integrated mode")],
    *[("1x4", case, 19, False) for case in ("dense", "mod", "limited experts")],
    *[("1x4", case, 3, False) for case in ("mod", "parts routed apart")],
    *[("2x2", case, 19, False) for case in ("mod in a window", "staged mode")],
]


def _by_layout(runs):
    return [(layout, [run[1:] for run in runs if run[0] == layout]) for layout in _LAYOUTS]


@pytest.mark.on_commit(4)
@pytest.mark.parametrize(("layout", "case", "length", "with_documents"), _QUICK)
def test_learns_as_in_one_process(layout, case, length, with_documents):
    _assert_learns_alike(layout, [(case, length, with_documents)])


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "runs"), _by_layout([r for r in _RUNS if r not in _QUICK]))
def test_all_cases_learn_as_in_one_process(layout, runs):
    _assert_learns_alike(layout, runs)


@pytest.mark.on_commit(1)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_learn_alike(mode):
    options = LayerOptions(activation_checkpointing=mode)
    _assert_learns_alike("1x2", [("mod", 19, True), ("limited experts", 19, False)], options)


@pytest.mark.on_commit(1)
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_layers_learn_alike(mode):
    options = LayerOptions(activation_checkpointing=mode, compile=True)
    _assert_learns_alike("1x2", [("staged mode", 19, True)], options, timeout=800)


def test_bf16_is_near():
    for ((_, found),) in on_ranks(
        _on_a_rank, 2, 2, [("mod", 19, False)], LayerOptions("bf16"), True
    ):
        wanted = _in_one_process("mod", 19, False)
        assert found.losses == pytest.approx(wanted.losses, abs=0.03)
        assert found.losses != pytest.approx(wanted.losses, abs=1e-5)
        assert found.norms == pytest.approx(wanted.norms, rel=0.1, abs=0.01)


def _shared(config, context):
    mesh = make_meshes("fsdp_cp", dist.get_world_size(), context_parallel=context).context
    model = Transformer(config)
    share_sequences(model, mesh)
    return model


def _padded_batch():
    tokens_BS, targets_BS = distinct_tokens(2, 19, 1), distinct_tokens(2, 19, 2)
    valid_BS = torch.ones(2, 19, dtype=torch.bool)
    valid_BS[0, :7] = valid_BS[1, 15:] = False
    return tokens_BS, targets_BS.where(valid_BS, IGNORED), valid_BS


def _of_padded(model):
    tokens_BS, targets_BS, valid_BS = _padded_batch()
    with torch.no_grad():
        logits_BSV = model(tokens_BS, valid_BS=valid_BS).require_logits()[valid_BS]
    output = model(tokens_BS, targets_BS, valid_BS=valid_BS)
    loss = sum(output.auxiliary.values(), start=output.loss)
    return float(loss.detach()), logits_BSV.numpy(), _records(output)


def _records(output):
    """Numbers of every record, without what a router left out."""
    return [
        (name, value.detach().double().tolist())
        for record in (*output.routing, *output.experts)
        for name, value in record._asdict().items()
        if value is not None
    ]


def _of_padded_on_a_rank(cases):
    return [_of_padded(_shared(_CASES[case], 2)) for case in cases]


def test_padding_and_logits():
    cases = ["parts routed apart", "limited experts", "integrated mode"]
    for results in on_ranks(_of_padded_on_a_rank, 2, cases):
        for case, (loss, logits, records) in zip(cases, results, strict=True):
            wanted = _of_padded(Transformer(_CASES[case]))
            assert loss == pytest.approx(wanted[0], abs=1e-5)
            assert logits == pytest.approx(wanted[1], abs=1e-5)
            assert [name for name, _ in records] == [name for name, _ in wanted[2]]
            for (name, ours), (_, theirs) in zip(records, wanted[2], strict=True):
                if name not in {"scores_BS", "predictor_BS"}:
                    # Padding is scored as well, and what it holds may be anything.
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)


_CONTROLS = ["random", "fixed"]


def _by_a_control(make, score):
    model = make(small(router=RouterConfig(score=score, gate="none")))
    torch.manual_seed(5)
    tokens_BS = distinct_tokens(2, 19)
    return [
        [record.chosen_BS.tolist() for record in model(tokens_BS, tokens_BS, way).routing]
        for way in ("top_k", "causal")
    ]


def _by_controls():
    make = functools.partial(_shared, context=2)
    return [_by_a_control(make, score) for score in _CONTROLS]


def test_controls_choose_alike():
    wanted = [_by_a_control(Transformer, score) for score in _CONTROLS]
    assert on_ranks(_by_controls, 2) == [wanted] * 2


def _evaluation_batches():
    return distinct_tokens(4, 20, 9).split(1)


def _evaluates(case, context):
    meshes = make_meshes("fsdp_cp", dist.get_world_size(), context_parallel=context)
    model = settle(Transformer(_CASES[case]), 19)
    parallelize.fsdp_cp(model, meshes, LayerOptions())

    def total(x):
        dist.all_reduce(x)
        return x / meshes.context.size()

    batches = _evaluation_batches()[meshes.data_rank :: meshes.data_size]
    found = evaluate(model, batches, contextlib.nullcontext(), total=total, budgets=_BUDGETS)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    return found


_BUDGETS = {"predictor": ComputeBudget(step_cap=1, layer_cap=0.4)}


@pytest.mark.parametrize(("case", "layout"), [("mod", "2x2"), ("parts routed apart", "1x2")])
def test_evaluates_as_in_one_process(case, layout):
    whole = settle(Transformer(_CASES[case]), 19)
    wanted = evaluate(whole, _evaluation_batches(), contextlib.nullcontext(), budgets=_BUDGETS)
    shares = [s for d in wanted.decisions.values() for s in d.realised_capacity.values()]
    assert len(set(shares)) > 3, "as many tokens take part everywhere"
    world_size, context = _LAYOUTS[layout]
    for found in on_ranks(_evaluates, world_size, case, context):
        assert found.tokens == wanted.tokens
        for decision, ours in [*found.decisions.items(), ("top_k", found.top_k)]:
            theirs = wanted.top_k if decision == "top_k" else wanted.decisions[decision]
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
            assert ours.flops == pytest.approx(theirs.flops)
            assert ours.realised_capacity == theirs.realised_capacity
            assert ours.agreement == theirs.agreement
            for layer, load in theirs.expert_load.items():
                assert ours.expert_load[layer] == pytest.approx(load)


_LONG = small(pattern="dense", num_layers=3, d_model=32, num_heads=4, num_kv_heads=1, d_ff=96)


def _kept(make):
    """Bytes of what a forward pass keeps for backward beside parameters."""
    model = make(_LONG)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def keep(x):
        if (start := x.untyped_storage().data_ptr()) not in known:
            sizes[start] = x.untyped_storage().nbytes()
        return x

    tokens_BS = torch.arange(512).remainder(48).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model(tokens_BS, tokens_BS)
    # Alive until here, lest memory be counted once for two.
    assert output.loss.requires_grad
    return sum(sizes.values())


def _kept_on_a_rank():
    return _kept(functools.partial(_shared, context=dist.get_world_size()))


def test_a_rank_keeps_its_share_of_the_activations():
    """Beside it the keys and values of all, and what its own queries see."""
    whole = _kept(Transformer)
    for size in (2, 4):
        kept = on_ranks(_kept_on_a_rank, size)
        assert max(kept) < whole / size * 1.45
        assert max(kept) < min(kept) * 1.1, "some ranks keep more than others"


@pytest.mark.parametrize("length", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_token_has_one_rank_and_all_have_as_many_keys_to_see(size, length):
    ranks = [Shares(Group("", size, rank)) for rank in range(size)]
    whole_S = torch.arange(length)
    owners = torch.zeros(length)
    work = set()
    for shares in ranks:
        own_L = shares.own(whole_S.unsqueeze(0), -1).squeeze(0)
        places_L = shares.places(length, whole_S.device)
        assert places_L[own_L >= 0].tolist() == own_L[own_L >= 0].tolist()
        assert set(places_L[own_L < 0].tolist()) <= {length - 1}
        place_S, is_held_S = shares.held(whole_S, length)
        assert own_L[place_S[is_held_S]].tolist() == whole_S[is_held_S].tolist()
        owners += is_held_S
        early, late, piece = shares.firsts(length)
        work.add(early + late + 2 * piece)
    assert owners.tolist() == [1] * length
    assert len(work) == 1


def test_what_cannot_be_shared_out_is_told():
    config = small(router=RouterConfig(score="attention", gate="none"), pattern=[1, 0.5, 1, 0.5])
    strategy = StrategyConfig("fsdp_cp", context_parallel=2)
    found = size_problems(strategy, "strategy", config, Launch(4, 0, 0, 4))
    assert [problem.key for problem in found] == ["model.router.score"]
    alone = StrategyConfig("fsdp_cp", context_parallel=1)
    assert size_problems(alone, "strategy", config, Launch(4, 0, 0, 4)) == []
    uneven = StrategyConfig("fsdp_cp", context_parallel=3)
    found = size_problems(uneven, "strategy", small(), Launch(4, 0, 0, 4))
    assert [problem.key for problem in found] == ["strategy.context_parallel"]
    misplaced = StrategyConfig("fsdp", context_parallel=2).problems("strategy")
    assert [problem.key for problem in misplaced] == ["strategy.context_parallel"]
    sizes = sizes_of(StrategyConfig("fsdp_cp"), small(), Launch(8, 0, 0, 4))
    assert (sizes.context, sizes.data_parallel, sizes.shard) == (4, 2, 8)


def _refusals():
    mesh = make_meshes("fsdp_cp", 2, context_parallel=2).context
    unknown = Transformer(_CASES["dense"])
    unknown.layers[1].module.attention = torch.nn.Identity()
    routed = small(router=RouterConfig(score="attention", gate="none"), pattern=[1, 0.5, 1, 0.5])
    said = []
    for model in (unknown, Transformer(routed)):
        with pytest.raises((TypeError, ConfigError)) as caught:
            share_sequences(model, mesh)
        said.append(str(caught.value))
    shared = _shared(_CASES["dense"], 2)
    with pytest.raises(TypeError) as caught:
        shared.extend(distinct_tokens(1, 4), Cache(shared.config, 1))
    return [*said, str(caught.value)]


def test_what_would_be_computed_wrong_is_refused():
    for unknown, routed, cached in on_ranks(_refusals, 2):
        assert "share out the tokens of Identity" in unknown
        assert "model.router.score" in routed
        assert "has no cache" in cached


def _trained(lines):
    return train(compose("train", lines)).status


def _history(runs, name):
    records = read_metrics(runs / name / "metrics.jsonl")
    return {
        (record["step"], key): value
        for record in records
        for key, value in record.items()
        # A router's figures are of a rank's last micro-batch.
        if key.startswith(("loss", "predictor_loss", "held_out", "grad_norm"))
    }


@pytest.mark.slow
def test_a_run_is_that_of_one_process(prepared, tmp_path):
    """Its data, seeds, clipping, accumulation, evaluation and checkpoints by Lightning."""

    def lines(name, *more):
        return [
            *("model=tiny", f"data.path={prepared}", f"runs_dir={tmp_path}", f"name={name}"),
            *("budget.steps=4", "batch.tokens=256", "batch.micro_batch_size=1", "eval.every=2"),
            *("eval.sequences=4", "eval.batch_size=1", "log.every=1", "checkpoint.every=2"),
            *("log.tensorboard=false", "log.progress=false", "strategy.accelerator=cpu"),
            *more,
        ]

    assert _trained(lines("one", "strategy=single")) == "complete"
    more = ("strategy=fsdp_cp", "strategy.context_parallel=2")
    assert on_ranks(_trained, 4, lines("four", *more), joins=False) == ["complete"] * 4
    wanted, found = _history(tmp_path, "one"), _history(tmp_path, "four")
    assert len(wanted) > 8 and found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, abs=1e-4), key
