"""A GGUF file, read as data: what its header says in Hugging Face's terms, and its tensors.

Imports gguf, of the extra ``modtrain[hf]``. Weights are dequantized to fp32 one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import DataError
from modtrain.common.reading import UnreadableError, open_regular
from modtrain.interop.architectures import LLAMA, QWEN2, QWEN3
from modtrain.interop.prompt_format import PromptFormat
from modtrain.interop.source import Source

OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
# Of "rope.scaling.": keys of rope_parameters.
_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
}
_FAMILIES = (LLAMA, QWEN2, QWEN3)
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_HEADER_BYTES, _MAX_VALUES, _MAX_ENTRIES = 2**27, 2**22, 2**16
# Sizes of the format's kinds of values; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4
_USE_ANOTHER = "remedy: import the model's Hugging Face folder"


def open_gguf(path: Path) -> Source:
    """Open the file.

    Raises:
        DataError: it is damaged, or holds what is not read.
    """
    try:
        with open_regular(path) as file:
            _check_header(file)
        reader = GGUFReader(path)
        fields = {name: value.contents() for name, value in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (UnreadableError, DataError) as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # the library raises many kinds for a damaged file
        raise DataError(f"{path} is not a whole GGUF file: {error}") from error
    family = fields.get("general.architecture")
    if family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        reason = f"general.architecture={family!r} cannot be imported"
        raise DataError(f"{path}: {reason}\nremedy: take a model of {known}")
    names = {_name(tensor, path): tensor for tensor in tensors}
    config = _config(fields, family, path) | {"tie_word_embeddings": "output.weight" not in tensors}
    shapes = {name: tuple(int(n) for n in tensors[of].shape[::-1]) for name, of in names.items()}

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(values).reshape(shapes[name])
        heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
        for ending, key in heads.items():
            if family == LLAMA and name.endswith(ending):
                return _halves(weight, int(config[key]))
        return weight

    tokenizer = _tokenizer(fields)
    own_format = _prompt_format(fields)
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    files = {path.name: file_sha256(path)}
    return Source(config, tokenizer, lambda _: own_format, shapes, read, files)


def _check_header(file: BinaryIO) -> None:
    """Walk the header without keeping it: the library would, as Python objects.

    Raises:
        DataError: it is longer than a model's, or is none.
    """

    def number(kind: str) -> int:
        size = struct.calcsize(kind)
        content = file.read(size)
        if len(content) < size:
            raise DataError("is not a whole GGUF file: its header is cut off")
        value: int = struct.unpack(kind, content)[0]
        return value

    def skip(count: int) -> None:
        if count > _MAX_HEADER_BYTES or file.tell() + count > _MAX_HEADER_BYTES:
            raise DataError(f"has a header of more than {_MAX_HEADER_BYTES:,} bytes")
        file.seek(count, 1)

    def skip_value(kind: int, budget: Callable[[int], None]) -> None:
        if kind == _STRING:
            skip(number("<Q"))
        elif kind == _ARRAY:
            inner, count = number("<I"), number("<Q")
            budget(count)
            if inner == _STRING:
                for _ in range(count):
                    skip(number("<Q"))
            else:
                skip(count * _size(inner))
        else:
            skip(_size(kind))

    total = 0

    def budget(count: int) -> None:
        nonlocal total
        total += count
        if total > _MAX_VALUES:
            raise DataError(f"has more than {_MAX_VALUES:,} values in its header")

    if file.read(4) != _MAGIC or number("<I") not in _VERSIONS:
        raise DataError("is not a GGUF file of version 2 or 3, little-endian")
    num_tensors, num_entries = number("<Q"), number("<Q")
    if max(num_tensors, num_entries) > _MAX_ENTRIES:
        raise DataError(f"has more than {_MAX_ENTRIES:,} tensors or entries")
    for _ in range(num_entries):
        skip(number("<Q"))
        skip_value(number("<I"), budget)


def _size(kind: int) -> int:
    if kind not in _SIZES:
        raise DataError(f"is not a whole GGUF file: its header has a value of kind {kind}")
    return _SIZES[kind]


def _name(name: str, path: Path) -> str:
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    _, _, rest = name.partition("blk.")
    layer, _, place = rest.partition(".")
    module, _, kind = place.rpartition(".")
    if not layer.isdecimal() or module not in IN_LAYER or kind not in ("weight", "bias"):
        reason = f"the tensor {name} is not represented by modtrain"
        raise DataError(f"{path}: {reason}\n{_USE_ANOTHER}")
    return f"model.layers.{layer}.{IN_LAYER[module]}.{kind}"


def _config(fields: Mapping[str, Any], family: str, path: Path) -> dict[str, Any]:
    """Return the content that the model's ``config.json`` would have."""
    own = {k.removeprefix(f"{family}."): v for k, v in fields.items() if k.startswith(f"{family}.")}
    config = {name: own[key] for key, name in KEYS.items() if key in own}
    if own.get("attention.sliding_window"):
        window = own["attention.sliding_window"]
        reason = f"{family}.attention.sliding_window={window} does not say for which layers"
        raise DataError(f"{path}: {reason}\n{_USE_ANOTHER}")
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    if own.get("rope.scaling.type", "none") != "none":
        for key, value in own.items():
            if key.startswith("rope.scaling."):
                name = key.removeprefix("rope.scaling.")
                rope[_SCALING.get(name, name)] = value
    rotated = own.get("rope.dimension_count")
    width = (
        own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]
    )
    if rotated not in (None, width):
        rope["partial_rotary_factor"] = rotated / width
    eos = fields.get("tokenizer.ggml.eos_token_id")
    return config | {"model_type": family, "rope_parameters": rope, "eos_token_id": eos}


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: there the two of a rotated pair are neighbours."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: Mapping[str, Any]) -> bytes | None:
    """Return the content of a ``tokenizer.json``; None for a kind that is not known exactly."""
    pre = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }.get(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("tokenizer.ggml.model") != "gpt2" or pre is None:
        return None
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pre, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([token])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer.to_str().encode()


def _prompt_format(fields: Mapping[str, Any]) -> PromptFormat:
    tokens = fields.get("tokenizer.ggml.tokens", [])
    numbers = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    known = {name: n for name, n in numbers.items() if isinstance(n, int) and 0 <= n < len(tokens)}
    begins = fields.get("tokenizer.ggml.add_bos_token", False) and "bos" in known
    return PromptFormat(
        (known["bos"],) if begins else (),
        (known["eos"],) if "eos" in known else (),
        fields.get("tokenizer.chat_template"),
        {f"{name}_token": tokens[number] for name, number in known.items()},
    )
