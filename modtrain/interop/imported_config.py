"""A Hugging Face configuration as a `ModelConfig`, or why it cannot be one.

Imports transformers, of the extra ``modtrain[hf]``, whose classes know the families' defaults and
former keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from modtrain.common.errors import DataError, Problem
from modtrain.interop.architectures import FIELDS, LLAMA, MISTRAL, QWEN2, QWEN3, ROPE_FIELDS
from modtrain.models.config import ModelConfig
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
_ROPE_NAMES = {"default": "none"} | {name: name for name in ROPE_FIELDS if name != "none"}


def parse_config(content: Mapping[str, Any], where: str) -> Any:
    """Return transformers' configuration of the ``config.json`` with this content.

    Raises:
        DataError: it is of another family, or its class refuses it. where: names the file.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise DataError(
            f"{where}: model_type={kind!r} cannot be imported\nremedy: take a model of {known}"
        )
    try:
        # Code that the file may name is never run.
        return _CLASSES[kind].from_dict(dict(content))
    except Exception as error:  # its checks raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{where} is not a configuration of {kind}: {reason}") from error


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
