"""Sequences shared out over ranks are computed, learned from and routed as in one process."""

import functools

import pytest
import torch
import torch.distributed as dist

from modtrain.common.errors import ConfigError
from modtrain.common.ignored_target import IGNORED
from modtrain.distributed.collectives import Group
from modtrain.distributed.launch import Launch
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.config import RouterConfig
from modtrain.models.transformer import Transformer
from modtrain.parallel.config import StrategyConfig
from modtrain.parallel.context import SequenceChunks, apply_context_parallel
from modtrain.parallel.dims import ParallelDims
from modtrain.parallel.meshes import make_meshes
from modtrain.parallel.validation import dims_problems
from tests.helpers.model_cases import MODELS, distinct_tokens, small
from tests.helpers.ranks import on_ranks


def _shared(config, context):
    shard = dist.get_world_size() // context
    meshes = make_meshes(ParallelDims(shard * context, shard=shard, context=context))
    model = Transformer(config)
    apply_context_parallel(model, meshes.context)
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
    return [_of_padded(_shared(MODELS[case], 2)) for case in cases]


@pytest.mark.slow
def test_padding_and_logits():
    cases = ["separately routed parts", "limited experts", "expert choice"]
    for results in on_ranks(_of_padded_on_a_rank, 2, cases):
        for case, (loss, logits, records) in zip(cases, results, strict=True):
            wanted = _of_padded(Transformer(MODELS[case]))
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


@pytest.mark.slow
def test_controls_choose_alike():
    wanted = [_by_a_control(Transformer, score) for score in _CONTROLS]
    assert on_ranks(_by_controls, 2) == [wanted] * 2


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
    ranks = [SequenceChunks(Group("", size, rank)) for rank in range(size)]
    whole_S = torch.arange(length)
    owners = torch.zeros(length)
    work = set()
    for chunks in ranks:
        own_L = chunks.local_chunk(whole_S.unsqueeze(0), -1).squeeze(0)
        places_L = chunks.local_positions(length, whole_S.device)
        assert places_L[own_L >= 0].tolist() == own_L[own_L >= 0].tolist()
        assert set(places_L[own_L < 0].tolist()) <= {length - 1}
        place_S, is_local_S = chunks.local_index_and_mask(whole_S, length)
        assert own_L[place_S[is_local_S]].tolist() == whole_S[is_local_S].tolist()
        owners += is_local_S
        early, late, piece = chunks.chunk_offsets(length)
        work.add(early + late + 2 * piece)
    assert owners.tolist() == [1] * length
    assert len(work) == 1


def test_what_context_parallelism_cannot_split_is_reported():
    config = small(router=RouterConfig(score="attention", gate="none"), pattern=[1, 0.5, 1, 0.5])
    strategy = StrategyConfig("fsdp_cp", context_parallel=2)
    problems = dims_problems(strategy, "strategy", config, Launch(4, 0, 0, 4))
    assert [problem.key for problem in problems] == ["model.router.score"]
    alone = StrategyConfig("fsdp_cp", context_parallel=1)
    assert dims_problems(alone, "strategy", config, Launch(4, 0, 0, 4)) == []


def _refusals():
    mesh = make_meshes(ParallelDims(2, context=2)).context
    unknown = Transformer(MODELS["dense"])
    unknown.layers[1].module.attention = torch.nn.Identity()
    routed = small(router=RouterConfig(score="attention", gate="none"), pattern=[1, 0.5, 1, 0.5])
    messages = []
    for model in (unknown, Transformer(routed)):
        with pytest.raises((TypeError, ConfigError)) as caught:
            apply_context_parallel(model, mesh)
        messages.append(str(caught.value))
    shared = _shared(MODELS["dense"], 2)
    with pytest.raises(TypeError) as caught:
        shared.extend(distinct_tokens(1, 4), Cache(shared.config, 1))
    return [*messages, str(caught.value)]


def test_what_would_be_computed_wrong_is_refused():
    for unknown, routed, cached in on_ranks(_refusals, 2):
        assert "does not support Identity" in unknown
        assert "model.router.score" in routed
        assert "has no cache" in cached
