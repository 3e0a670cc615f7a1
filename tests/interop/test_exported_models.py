"""Exported models compute what modtrain computes, and keep transformers' contracts."""

import pytest
import torch

from modtrain.interop.remote_code.modeling_modtrain import ModtrainCache, ModtrainForCausalLM
from tests.helpers.model_cases import random_tokens
from tests.interop.exported_models import (
    LENGTH,
    OWN,
    PLAIN,
    exported,
    greedy,
    make_exported,
    pad_left,
)

PROMPTS = [
    row.tolist()[:count] for row, count in zip(random_tokens(3, 12), (12, 5, 1), strict=True)
]
# One of every kind of layer, for what depends on the cache.
CACHED = [
    *("mod", "mod in a window", "separately routed parts", "staged", "expert choice", "random"),
    "kept keys",
]


def assert_equal_logits(actual, expected):
    """Equal to within 1e-5 of the largest logit."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", [*PLAIN, *OWN])
def test_logits_are_those_of_every_causal_decision(name):
    ours, theirs = exported(name)
    tokens_BS = random_tokens(3, LENGTH)
    decisions = ours.config.causal_selections
    for decision in decisions:
        if len(decisions) > 1:
            theirs.config.decision = decision
        expected = ours(tokens_BS, selection=decision)
        assert_equal_logits(theirs(tokens_BS).logits, expected.logits_BSV)
        chosen = [record.chosen_BS for record in expected.routing]
        assert all(0 < float(chosen_BS.float().mean()) <= 1 for chosen_BS in chosen)
    if len(decisions) > 1:
        theirs.config.decision = decisions[0]


@pytest.mark.parametrize("name", [*PLAIN, *OWN])
def test_greedy_text_of_a_padded_batch_is_that_of_modtrain(name):
    ours, theirs = exported(name)
    ids_BS, mask_BS = pad_left(PROMPTS)
    out_BT = theirs.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=10, do_sample=False)
    assert out_BT[:, ids_BS.shape[1] :].tolist() == greedy(ours, PROMPTS, 10)


@pytest.mark.parametrize("name", OWN)
def test_padding_on_either_side_changes_nothing(name):
    theirs = exported(name).theirs
    tokens_BS = random_tokens(1, 8)
    alone_BSV = theirs(tokens_BS).logits
    for left in (0, 3):
        padding = (left, 3 - left)
        padded_BS = torch.nn.functional.pad(tokens_BS, padding, value=7)
        mask_BS = torch.nn.functional.pad(torch.ones_like(tokens_BS), padding)
        logits_BSV = theirs(padded_BS, attention_mask=mask_BS).logits
        assert_equal_logits(logits_BSV[:, left : left + 8], alone_BSV)


@pytest.mark.parametrize("name", CACHED)
def test_the_cache_holds_what_entered_and_gives_the_logits_of_the_whole_text(name):
    ours, theirs = exported(name)
    tokens_BS = random_tokens(2, LENGTH, seed=3)
    cache = ModtrainCache(theirs.config)
    parts = [
        theirs(part, past_key_values=cache).logits for part in tokens_BS.split([9, 1, 1, 13], 1)
    ]
    output = ours(tokens_BS, selection=ours.config.causal_selections[0])
    assert_equal_logits(torch.cat(parts, dim=1), output.logits_BSV)
    assert cache.get_seq_length() == LENGTH
    entered = {
        layer: record.chosen_BS
        for (layer, part), record in zip(ours.config.routed_parts, output.routing, strict=True)
        if part != "mlp" and not ours.config.router.keep_kv
    }
    drops = ours.config.sliding_window is not None
    for number, layer in enumerate(cache.layers):
        if drops or ours.config.mixers[number] == "convolution":
            continue
        chosen_BS = entered.get(number, torch.ones_like(tokens_BS, dtype=torch.bool))
        stored = [row[row >= 0].tolist() for row in layer.column_BL]
        assert stored == [row.nonzero().flatten().tolist() for row in chosen_BS]


def test_a_cache_drops_what_no_later_token_reads():
    theirs = exported("separately routed parts").theirs
    cache = ModtrainCache(theirs.config)
    tokens_BS = random_tokens(1, 40)
    for part in tokens_BS.split(4, 1):
        theirs(part, past_key_values=cache)
    convolutions = [i for i, name in enumerate(theirs.config.layer_mixers) if name == "convolution"]
    kept = theirs.config.conv_width - 1 + 4
    assert all(cache.layers[i].column_BL.shape[1] <= kept for i in convolutions)
    with pytest.raises(ValueError, match="can be cropped to"):
        cache.crop(-30)


@pytest.mark.parametrize("name", CACHED)
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_been_there(name):
    theirs = exported(name).theirs
    tokens_BS, others_BS = random_tokens(2, 16, seed=5), random_tokens(2, 4, seed=6)
    cache = ModtrainCache(theirs.config)
    theirs(tokens_BS[:, :8], past_key_values=cache)
    theirs(others_BS, past_key_values=cache)
    cache.crop(-3)
    logits_BSV = theirs(tokens_BS[:, 9:], past_key_values=cache).logits
    text_BS = torch.cat([tokens_BS[:, :8], others_BS[:, :1], tokens_BS[:, 9:]], dim=1)
    assert_equal_logits(logits_BSV, theirs(text_BS).logits[:, 9:])


@pytest.mark.parametrize("name", ["mod in a window", "separately routed parts"])
def test_a_drafting_models_cache_can_be_cropped_by_many_calls(name):
    theirs = exported(name).theirs
    tokens_BS = random_tokens(1, 24, seed=9)
    cache = ModtrainCache(theirs.config)
    cache.activate_past_recording()
    for token_B1 in tokens_BS[:, :20].split(1, dim=1):
        theirs(token_B1, past_key_values=cache)
    cache.crop(-8)
    logits_BSV = theirs(tokens_BS[:, 12:], past_key_values=cache).logits
    assert_equal_logits(logits_BSV, theirs(tokens_BS).logits[:, 12:])


@pytest.mark.parametrize("name", CACHED)
def test_sequences_of_a_cache_are_repeated_and_selected(name):
    theirs = exported(name).theirs
    ids_BS, mask_BS = pad_left(PROMPTS[:2])
    cache = ModtrainCache(theirs.config)
    theirs(ids_BS, attention_mask=mask_BS, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    rows, next_BS = [1, 0, 0], random_tokens(3, 3, seed=8)
    mask_BT = torch.cat([mask_BS[rows], torch.ones_like(next_BS)], dim=1)
    logits_BSV = theirs(next_BS, attention_mask=mask_BT, past_key_values=cache).logits
    whole_BT = torch.cat([ids_BS[rows], next_BS], dim=1)
    expected_BTV = theirs(whole_BT, attention_mask=mask_BT).logits
    assert_equal_logits(logits_BSV, expected_BTV[:, -3:])


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.on_commit(2)
def test_beams_are_those_without_a_cache(name):
    theirs = exported(name).theirs
    ids_BS, mask_BS = pad_left(PROMPTS)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached, whole = (
        theirs.generate(ids_BS, attention_mask=mask_BS, use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert cached.tolist() == whole.tolist()


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.on_commit(2)
def test_assisted_text_is_the_greedy_one(name):
    theirs = exported(name).theirs
    assistant = make_exported(OWN[name]).theirs
    for parameter in assistant.parameters():
        parameter.add_(
            0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        )
    tokens_BS = random_tokens(1, 10)
    options = {"max_new_tokens": 16, "do_sample": False}
    expected = theirs.generate(tokens_BS, **options).tolist()
    assert theirs.generate(tokens_BS, assistant_model=assistant, **options).tolist() == expected
    assert theirs.generate(tokens_BS, prompt_lookup_num_tokens=3, **options).tolist() == expected


def test_a_prompt_in_chunks_gives_the_same_text():
    theirs = exported("mod").theirs
    tokens_BS = random_tokens(2, 11)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = theirs.generate(tokens_BS, **options).tolist()
    assert theirs.generate(tokens_BS, prefill_chunk_size=4, **options).tolist() == expected


def test_embeddings_and_kept_logits_and_hidden_states():
    theirs = exported("mod").theirs
    tokens_BS = random_tokens(2, 9)
    expected = theirs(tokens_BS).logits
    output = theirs(
        inputs_embeds=theirs.get_input_embeddings()(tokens_BS),
        logits_to_keep=2,
        output_hidden_states=True,
    )
    assert_equal_logits(output.logits, expected[:, -2:])
    assert len(output.hidden_states) == theirs.config.num_hidden_layers + 1
    assert_equal_logits(theirs.lm_head(output.hidden_states[-1]), expected)
    assert_equal_logits(theirs(tokens_BS, return_dict=False)[0], expected)


def test_what_a_model_does_not_take_is_refused():
    theirs = exported("mod").theirs
    tokens_BS = random_tokens(1, 4)
    with pytest.raises(ValueError, match="attention_mask is"):
        theirs(tokens_BS, attention_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="ModtrainCache"):
        from transformers import DynamicCache

        theirs(tokens_BS, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation"):
        theirs.generate(tokens_BS, cache_implementation="static", max_new_tokens=1)
    with pytest.raises(ValueError, match="exactly one"):
        theirs()
    with pytest.raises(ValueError, match="decision=sign"):
        type(theirs.config)(decision="sign")


@pytest.mark.parametrize("name", ["mod", "separately routed parts", "staged", "expert choice"])
def test_a_new_model_is_initialised_and_trains(name):
    torch.manual_seed(0)
    config = exported(name).theirs.config
    model = ModtrainForCausalLM(config)
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        is_zero = key.endswith(("bias", "threshold"))
        assert is_zero or value.abs().max() > 0, key
    size = config.hidden_size
    if "model.layers.1.router.weight" in model.state_dict():
        assert 0.4 < model.model.layers[1].router.weight.std() * size**0.5 < 1.8
    tokens_BS = random_tokens(2, LENGTH)
    with torch.enable_grad():
        loss = model(tokens_BS, labels=tokens_BS).loss
        loss.backward()
    assert 3 < float(loss) < 6
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


def test_routers_stay_in_fp32_in_a_narrow_model(tmp_path):
    theirs = exported("mod").theirs
    theirs.save_pretrained(tmp_path)
    narrow = ModtrainForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in narrow.state_dict().items()}
    routers = {name for name in kinds if "router." in name}
    assert routers and all(kinds[name] == torch.float32 for name in routers)
    assert all(kinds[name] == torch.bfloat16 for name in kinds.keys() - routers)
    tokens_BS = random_tokens(2, LENGTH)
    logits_BSV = narrow(tokens_BS).logits
    assert logits_BSV.dtype == torch.bfloat16 and logits_BSV.isfinite().all()
    out = narrow.generate(tokens_BS, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, LENGTH + 4)


def test_sharded_weights_are_saved_and_loaded(tmp_path):
    theirs = exported("separately routed parts").theirs
    theirs.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("model-*.safetensors"))) > 2
    again = ModtrainForCausalLM.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    third = ModtrainForCausalLM.from_pretrained(tmp_path / "second")
    tokens_BS = random_tokens(2, LENGTH)
    assert torch.equal(third(tokens_BS).logits, theirs(tokens_BS).logits)
    assert third.config.to_diff_dict() == theirs.config.to_diff_dict()


def test_a_decision_is_chosen_on_loading(tmp_path):
    ours, theirs = exported("mod")
    theirs.save_pretrained(tmp_path)
    model = ModtrainForCausalLM.from_pretrained(tmp_path, decision="threshold")
    tokens_BS = random_tokens(2, LENGTH)
    expected = ours(tokens_BS, selection="threshold").logits_BSV
    assert_equal_logits(model(tokens_BS).logits, expected)
