"""A GGUF file, read as data: what its header says in Hugging Face's terms, and its tensors.

Imports gguf, of the extra ``modtrain[hf]``. Weights are dequantized to fp32 one at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from modtrain.interop.imported_config import MAX_SIZE, is_size
from modtrain.interop.original_files import token_ids
from modtrain.interop.prompt_format import PromptFormat, checked_template
from modtrain.interop.source import Source
from modtrain.models.config import MAX_LAYERS

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
_OPTIONAL = ("attention.head_count_kv", "attention.key_length")
_DEFAULT_THETA = 10000.0
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
    header = _Header(path, fields)
    config = _config(header, family) | {"tie_word_embeddings": "output.weight" not in tensors}
    shapes = {name: tuple(int(n) for n in tensors[of].shape[::-1]) for name, of in names.items()}

    def read(name: str) -> Tensor:
        tensor = tensors[names[name]]
        try:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            reason = f"{tensor.name} of type {tensor.tensor_type.name} cannot be read: {error}"
            raise DataError(f"{path}: {reason}\n{_USE_ANOTHER}") from error
        weight = torch.from_numpy(values).reshape(shapes[name])
        heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
        for ending, key in heads.items():
            if family == LLAMA and name.endswith(ending):
                return _halves(weight, int(config[key]))
        return weight

    tokenizer = _tokenizer(header)
    own_format = _prompt_format(header)
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
    layer, _, place = name.removeprefix("blk.").partition(".")
    module, _, kind = place.rpartition(".")
    is_of_layer = name.startswith("blk.") and layer.isdecimal()
    if not is_of_layer or module not in IN_LAYER or kind not in ("weight", "bias"):
        reason = f"the tensor {name} is not represented by modtrain"
        raise DataError(f"{path}: {reason}\n{_USE_ANOTHER}")
    return f"model.layers.{layer}.{IN_LAYER[module]}.{kind}"


@dataclass(frozen=True)
class _Header:
    """The entries of the header of the file ``path``; what is of a wrong kind is a DataError."""

    path: Path
    fields: Mapping[str, Any]

    def error(self, key: str, reason: str) -> DataError:
        return DataError(f"{self.path}: {key} {reason}\n{_USE_ANOTHER}")

    def size(self, key: str, most: int = MAX_SIZE) -> int | None:
        value = self.fields.get(key)
        if value is not None and not is_size(value, most):
            raise self.error(key, f"is {value!r:.60}, not a whole number from 1 to {most:,}")
        return value

    def number(self, key: str) -> float | None:
        value = self.fields.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise self.error(key, f"is {value!r:.60}, not a number")
        return value

    def text(self, key: str) -> str | None:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"is {value!r:.60}, not a text")
        return value

    def values(self, key: str, kind: type) -> list[Any]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            reason = "is missing" if value is None else f"is not a list of {kind.__name__}"
            raise self.error(key, reason)
        return value


def _config(header: _Header, family: str) -> dict[str, Any]:
    """Return the content that the model's ``config.json`` would have."""
    config: dict[str, Any] = {}
    for key, name in KEYS.items():
        whole = f"{family}.{key}"
        if name == "rms_norm_eps":
            value = header.number(whole)
        else:
            value = header.size(whole, MAX_LAYERS if key == "block_count" else MAX_SIZE)
        if value is None and key not in _OPTIONAL:
            raise header.error(whole, "is missing")
        if value is not None:
            config[name] = value
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    window = header.fields.get(f"{family}.attention.sliding_window")
    if window:
        reason = f"is {window!r:.60}, and does not say for which layers"
        raise header.error(f"{family}.attention.sliding_window", reason)
    rope = _rope(header, f"{family}.rope.")
    width = config.get("head_dim") or config["hidden_size"] // heads
    rotated = header.size(f"{family}.rope.dimension_count")
    if rotated not in (None, width):
        rope["partial_rotary_factor"] = rotated / max(1, width)
    ids = {}
    for name, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        known = token_ids(header.fields.get(f"tokenizer.ggml.{stored}_token_id"))
        ids[f"{name}_token_id"] = known[0] if known else None
    return config | {"model_type": family, "rope_parameters": rope, **ids}


def _rope(header: _Header, prefix: str) -> dict[str, Any]:
    """Return the content of ``rope_parameters``. A factor without a type is a linear scaling."""
    theta = header.number(f"{prefix}freq_base")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _DEFAULT_THETA if theta is None else theta,
    }
    # Files of the format's first years have it in place of the factor.
    old = header.number(f"{prefix}scale_linear")
    factor = header.number(f"{prefix}scaling.factor")
    factor = factor or old or 1.0
    kind = header.text(f"{prefix}scaling.type") or ("none" if factor == 1 else "linear")
    if kind == "none":
        return rope
    for key, value in header.fields.items():
        if key.startswith(f"{prefix}scaling."):
            name = key.removeprefix(f"{prefix}scaling.")
            rope[_SCALING.get(name, name)] = value
    return rope | {"rope_type": kind, "factor": factor}


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows: there the two of a rotated pair are neighbours."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(header: _Header) -> bytes | None:
    """Return the content of a ``tokenizer.json``; None for a kind that is not known exactly."""
    pre = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }.get(header.text("tokenizer.ggml.pre") or "")
    if header.text("tokenizer.ggml.model") != "gpt2" or pre is None:
        return None
    tokens = header.values("tokenizer.ggml.tokens", str)
    kinds = header.values("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        reason = f"has {len(kinds):,} entries for {len(tokens):,} tokens"
        raise header.error("tokenizer.ggml.token_type", reason)
    merges = [
        (first, second)
        for first, _, second in (
            merge.partition(" ") for merge in header.values("tokenizer.ggml.merges", str)
        )
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises bare Exceptions
        raise header.error("tokenizer.ggml.merges", f"are not of its tokens: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pre, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([token])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer.to_str().encode()


def _prompt_format(header: _Header) -> PromptFormat:
    fields, key = header.fields, "tokenizer.ggml.tokens"
    tokens = header.values(key, str) if key in fields else []
    numbers = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    known = {name: n for name, n in numbers.items() if type(n) is int and 0 <= n < len(tokens)}
    begins = fields.get("tokenizer.ggml.add_bos_token", False) and "bos" in known
    return PromptFormat(
        (known["bos"],) if begins else (),
        (known["eos"],) if "eos" in known else (),
        checked_template(
            fields.get("tokenizer.chat_template"), f"{header.path}: tokenizer.chat_template"
        ),
        {f"{name}_token": tokens[number] for name, number in known.items()},
    )
