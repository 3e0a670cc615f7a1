"""A Hugging Face configuration as a `ModelConfig`, or why it cannot be one.

Imports transformers, of the extra ``modtrain[hf]``, whose classes know the families' defaults and
former keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from modtrain.common.errors import DataError, Problem
from modtrain.interop.architectures import FIELDS, LLAMA, MISTRAL, QWEN2, QWEN3, ROPE_FIELDS
from modtrain.models.config import MAX_LAYERS, ModelConfig
from modtrain.models.rope.config import RopeScalingConfig

_CLASSES: dict[str, Any] = {
    LLAMA: LlamaConfig,
    MISTRAL: MistralConfig,
    QWEN2: Qwen2Config,
    QWEN3: Qwen3Config,
}
# Values that a key may have. A family that has no such key has the first one.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}
# Larger numbers are mistakes, and would be lists and tensors before any other check.
MAX_SIZE = 2**31 - 1
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")
_NUMBERS = ("rms_norm_eps", "initializer_range")
_FLAGS = ("tie_word_embeddings", "use_sliding_window")
# Of a classifier: transformers makes a table of as many names.
_UNUSED = ("num_labels", "id2label", "label2id")
_ROPE_NAMES = {"default": "none"} | {name: name for name in ROPE_FIELDS if name != "none"}


def parse_config(content: Mapping[str, Any], where: str) -> Any:
    """Return transformers' configuration of the ``config.json`` with this content.

    Raises:
        DataError: it is of another family, its class refuses it, or a value is of a wrong kind;
            names each key. where: names the file.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise DataError(
            f"{where}: model_type={kind!r} cannot be imported\nremedy: take a model of {known}"
        )
    # Sizes come first: the class makes lists of as many entries as there are layers.
    _raise_if_wrong(_wrong_sizes(content), where)
    used = {key: value for key, value in content.items() if key not in _UNUSED}
    try:
        # Code that the file may name is never run.
        config = _CLASSES[kind].from_dict(used)
    except Exception as error:  # its checks raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{where} is not a configuration of {kind}: {reason}") from error
    _raise_if_wrong(_wrong_values(config), where)
    return config


def _raise_if_wrong(lines: list[str], where: str) -> None:
    if lines:
        shown = "".join(f"\n  {line}" for line in lines)
        raise DataError(f"{where}: its configuration is damaged:{shown}")


def is_size(value: object, most: int = MAX_SIZE) -> bool:
    """Whether it is a whole number from 1 to ``most``."""
    return type(value) is int and 1 <= value <= most


def _wrong_sizes(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in _SIZES:
        most = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
        value = content.get(key)
        is_absent = key not in content or (value is None and key in _MAY_BE_NULL)
        if not is_absent and not is_size(value, most):
            lines.append(f"{key}={_short(value)} is not a whole number from 1 to {most:,}")
    return lines


def _wrong_values(config: Any) -> list[str]:
    """Return what is of a wrong kind in transformers' configuration, which takes anything."""
    rope = config.rope_parameters
    if not isinstance(rope, Mapping):
        return [f"rope_parameters={_short(rope)} is not a table"]
    numbers = {key: getattr(config, key) for key in _NUMBERS}
    keys = {key for fields in ROPE_FIELDS.values() for key in fields} - {"truncate"}
    numbers |= {
        f"rope_parameters.{key}": rope[key] for key in sorted(keys) if rope.get(key) is not None
    }
    numbers["rope_parameters.rope_theta"] = rope.get("rope_theta")
    lines = [
        f"{key}={_short(value)} is not a number"
        for key, value in numbers.items()
        if type(value) not in (int, float) or not math.isfinite(value)
    ]
    flags = {key: getattr(config, key, False) for key in _FLAGS}
    flags["rope_parameters.truncate"] = rope.get("truncate", True)
    lines += [
        f"{key}={_short(value)} is not true or false"
        for key, value in flags.items()
        if type(value) is not bool
    ]
    if not isinstance(rope.get("rope_type", ""), str):
        lines.append(f"rope_parameters.rope_type={_short(rope['rope_type'])} is not a text")
    layers = getattr(config, "layer_types", None)
    if layers is not None and not (
        isinstance(layers, list) and all(isinstance(kind, str) for kind in layers)
    ):
        lines.append(f"layer_types={_short(layers)} is not a list of texts")
    return lines


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def model_config(config: Any) -> tuple[ModelConfig, list[Problem]]:
    """Return what ``config`` is here, and every key of it that cannot be represented."""
    problems = []
    for key, allowed in _ONLY.items():
        value = getattr(config, key, allowed[0])
        if value not in allowed:
            remedy = f"take a model with {key}={allowed[0]}"
            problems.append(Problem(key, value, "is not represented by modtrain", remedy))
    scaling, theta, rope_problems = _rope(config.rope_parameters)
    window, window_problems = _window(config)
    problems += rope_problems + window_problems
    values = {name: getattr(config, key) for key, name in FIELDS.items() if hasattr(config, key)}
    kind = config.model_type
    model = ModelConfig(
        **values,
        pattern="dense",
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        qk_norm=kind == QWEN3,
        qkv_bias=kind == QWEN2,
    )
    return model, problems or model.problems("model")


def _rope(rope: Mapping[str, Any]) -> tuple[RopeScalingConfig, float, list[Problem]]:
    """Return scaling and base of the rotary positions, and what of them is not represented."""
    key, remedy = "rope_parameters", f"take a model with one of {', '.join(_ROPE_NAMES)}"
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    if kind not in _ROPE_NAMES:
        reason = "is not represented by modtrain"
        return RopeScalingConfig(), theta, [Problem(f"{key}.rope_type", kind, reason, remedy)]
    fields = ROPE_FIELDS[_ROPE_NAMES[kind]]
    neutral = {"rope_type": kind, "rope_theta": theta, "type": kind, "partial_rotary_factor": 1.0}
    problems = [
        Problem(f"{key}.{name}", value, f"is not represented by modtrain for {kind}", remedy)
        for name, value in rope.items()
        if name not in fields and value is not None and neutral.get(name) != value
    ]
    if kind in ("default", "linear"):
        # Some files name the first length, which these two do not use.
        unused = f"{key}.original_max_position_embeddings"
        problems = [problem for problem in problems if problem.key != unused]
    given = {name: rope[name] for name in fields if rope.get(name) is not None}
    return RopeScalingConfig(_ROPE_NAMES[kind], **_renamed(given, fields)), theta, problems


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in values.items()}


def _window(config: Any) -> tuple[int | None, list[Problem]]:
    """Return the window of all layers; layers that differ cannot be represented."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == LLAMA:
        return None, []
    layers = set(getattr(config, "layer_types", None) or [])
    if config.model_type == MISTRAL:
        layers = layers or {"sliding_attention" if window is not None else "full_attention"}
    if layers <= {"full_attention"}:
        return None, []
    if layers == {"sliding_attention"}:
        return window, []
    reason = "is not represented by modtrain: a window is that of all layers"
    return None, [Problem("layer_types", sorted(layers), reason, "take a model with one kind")]
