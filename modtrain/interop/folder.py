"""A Hugging Face folder of a model: configuration, weights, tokenizer, and code where it needs it.

Imports transformers, of the extra ``modtrain[hf]``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
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
from modtrain.interop.prompt_format import PromptFormat
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
    end = values["eos_token_id"]
    first = end[0] if isinstance(end, list) else end
    pad_id = values.get("pad_token_id")
    exported.generation_config = GenerationConfig(
        bos_token_id=values["bos_token_id"],
        eos_token_id=end,
        pad_token_id=first if pad_id is None else pad_id,
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


def write_tokenizer(
    content: bytes,
    end_id: int,
    max_length: int,
    folder: Path,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Write the tokenizer's files: those of a `PreTrainedTokenizerFast`.

    content: of a ``tokenizer.json``. end_id: the end-of-document token, which begins a text and
    pads it, too, where ``prompt_format`` does not say otherwise. max_length: tokens of a training
    sequence. prompt_format: of an imported model.
    """
    tokenizer = parse_tokenizer(content, str(folder))
    prompt_format = prompt_format or PromptFormat()
    begin_ids = [*prompt_format.begin_ids]
    added = len(tokenizer.encode("a").ids) - len(
        tokenizer.encode("a", add_special_tokens=False).ids
    )
    if added and not begin_ids:
        # The model has not seen the special tokens that it would add to each text.
        without = json.dumps(json.loads(content) | {"post_processor": None})
        tokenizer = parse_tokenizer(without.encode(), str(folder))
    elif begin_ids and not added:
        tokenizer.post_processor = _adding(tokenizer, begin_ids)
    end = tokenizer.id_to_token(end_id)
    special = {"bos_token": end, "eos_token": end, "pad_token": end}
    written = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **(special | dict(prompt_format.special_tokens)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    written.chat_template = prompt_format.chat_template
    written.save_pretrained(folder)


def _adding(tokenizer: Tokenizer, ids: list[int]) -> processors.TemplateProcessing:
    """Return what puts the tokens ``ids`` before each text."""
    texts = [tokenizer.id_to_token(number) for number in ids]
    tokens = dict(zip(texts, ids, strict=True))
    return processors.TemplateProcessing(
        single=[*texts, "$A"], pair=[*texts, "$A", "$B"], special_tokens=[*tokens.items()]
    )
