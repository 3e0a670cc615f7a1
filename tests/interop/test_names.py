"""Names of weights, there and back."""

import pytest
import torch
from hypothesis import given

from modtrain.interop.architectures import OWN, architecture, export_problems
from modtrain.interop.names import portable_weights, rename, to_hugging_face, weight_names
from modtrain.models.transformer import Transformer
from tests.helpers.model_cases import MODELS, configs, quick, random_tokens
from tests.interop.exported_models import make_exported


@pytest.mark.parametrize("name", MODELS)
def test_weights_return_to_their_names(name):
    weights = portable_weights(Transformer(MODELS[name]))
    names = weight_names(MODELS[name])
    back = rename(rename(weights, names), {other: name for name, other in names.items()})
    assert back.keys() == weights.keys()
    assert all(back[name] is weights[name] for name in weights)


@quick(40)
@given(configs())
def test_every_tensor_of_every_model_has_a_name_of_its_own(config):
    model = Transformer(config)
    exported = to_hugging_face(model)
    assert len(exported) == len(portable_weights(model))


@pytest.mark.nightly
@quick(60)
@given(configs())
def test_every_model_is_exported_or_refused(config):
    if export_problems(config):
        assert not config.causal_selections
        return
    exported = make_exported(config)
    tokens_BS = random_tokens(2, 17)
    with torch.no_grad():
        expected = exported.ours(tokens_BS, selection=config.causal_selections[0]).logits_BSV
        actual = exported.theirs(tokens_BS).logits
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)
    is_plain = not config.is_routed and config.activation == "swiglu"
    is_plain &= set(config.mixers) == {"attention"}
    assert architecture(config) == OWN or is_plain


def test_a_tensor_without_a_name_is_reported():
    with pytest.raises(ValueError, match=r"\['b', 'c'\]"):
        rename({"a": torch.ones(1), "b": torch.ones(1)}, {"a": "x", "c": "y"})
