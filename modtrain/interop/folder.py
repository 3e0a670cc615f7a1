"""A Hugging Face folder of a model: configuration, weights, tokenizer, and code where it needs it.

Imports transformers, of the extra ``modtrain[hf]``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.interop.architectures import LLAMA, MISTRAL, OWN, QWEN2, QWEN3, architecture
from modtrain.interop.names import to_hugging_face
from modtrain.interop.remote_code.configuration_modtrain import ModtrainConfig
from modtrain.interop.remote_code.modeling_modtrain import ModtrainForCausalLM, ModtrainModel
from modtrain.models.transformer import Transformer

_CLASSES: dict[str, tuple[Any, Any]] = {
    LLAMA: (LlamaConfig, LlamaForCausalLM),
    MISTRAL: (MistralConfig, MistralForCausalLM),
    QWEN2: (Qwen2Config, Qwen2ForCausalLM),
    QWEN3: (Qwen3Config, Qwen3ForCausalLM),
    OWN: (ModtrainConfig, ModtrainForCausalLM),
}


def hugging_face_model(model: Transformer, values: dict[str, Any]) -> PreTrainedModel:
    """Return the Hugging Face model with the weights of ``model``.

    values: of its configuration, see `modtrain.interop.architectures.architecture_config`.
    """
    make_config, make_model = _CLASSES[architecture(model.config)]
    loaded, info = make_model.from_pretrained(
        None,
        config=make_config(**values),
        state_dict=to_hugging_face(model),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if wrong := {kind: names for kind, names in info.items() if names}:
        raise ValueError(f"the weights do not fit the Hugging Face model: {wrong}")
    exported: PreTrainedModel = loaded
    end_id = values["eos_token_id"]
    exported.generation_config = GenerationConfig(
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=end_id
    )
    return exported.eval()


def write_model(exported: PreTrainedModel, folder: Path, max_shard_size: str) -> None:
    """Write configuration, generation configuration, weights, and the code of an own model."""
    if isinstance(exported, ModtrainForCausalLM):
        ModtrainConfig.register_for_auto_class()
        ModtrainForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        name = ModtrainModel.__name__
        exported.config.auto_map = {
            "AutoModel": f"{ModtrainModel.__module__.split('.')[-1]}.{name}"
        }
    exported.save_pretrained(folder, max_shard_size=max_shard_size)


def write_tokenizer(content: bytes, end_id: int, max_length: int, folder: Path) -> None:
    """Write the tokenizer's files: those of a `PreTrainedTokenizerFast`.

    content: of a ``tokenizer.json``. end_id: the end-of-document token, which begins a text and
    pads it, too. max_length: tokens of a training sequence.
    """
    tokenizer = parse_tokenizer(content, str(folder))
    if len(tokenizer.encode("a").ids) != len(tokenizer.encode("a", add_special_tokens=False).ids):
        # The model has not seen the special tokens that it would add to each text.
        without = json.dumps(json.loads(content) | {"post_processor": None})
        tokenizer = parse_tokenizer(without.encode(), str(folder))
    end = tokenizer.id_to_token(end_id)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
