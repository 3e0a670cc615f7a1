"""The angles of rotary positions.

Shapes: B batch, S sequence, W half the width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modtrain.models.rope.config import RopeScalingConfig


def rotary(
    positions_BS: Tensor, head_width: int, theta: float, scaling: RopeScalingConfig
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (B, S, W) of each position's angles."""
    frequency_W = frequencies(head_width, theta, scaling, positions_BS.device)
    angle_BSW = positions_BS.unsqueeze(-1).float() * frequency_W
    amplitude = scaling.amplitude
    if amplitude == 1:
        return angle_BSW.cos(), angle_BSW.sin()
    return angle_BSW.cos() * amplitude, angle_BSW.sin() * amplitude


def frequencies(
    head_width: int,
    theta: float,
    scaling: RopeScalingConfig,
    device: torch.device | None = None,
) -> Tensor:
    """Return by how many radians each pair of a head turns from one position to the next (W)."""
    exponent_W = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    frequency_W = theta**-exponent_W
    if scaling.name == "linear":
        return frequency_W / scaling.factor
    if scaling.name == "llama3":
        kept_W = _kept_by_llama3(frequency_W, scaling)
    elif scaling.name == "yarn":
        kept_W = _kept_by_yarn(frequency_W, head_width, theta, scaling)
    else:
        return frequency_W
    return frequency_W * kept_W + frequency_W / scaling.factor * (1 - kept_W)


def _kept_by_llama3(frequency_W: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Return the share of each frequency that is kept, rising with its turns (Llama 3.1)."""
    num_turns_W = (scaling.original_positions or 0) * frequency_W / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((num_turns_W - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(
    frequency_W: Tensor, head_width: int, theta: float, scaling: RopeScalingConfig
) -> Tensor:
    """Return the share of each frequency that is kept (arXiv 2309.00071, section 3.2)."""

    def pair_of(num_turns: float) -> float:
        """Return the pair, a fraction, that turns so often within the original positions."""
        radians = num_turns * 2 * math.pi
        ratio = math.log((scaling.original_positions or 0) / radians)
        return head_width * ratio / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_width - 1)
    # Equal bounds are a step.
    width = max(last - first, 0.001)
    pair_W = torch.arange(len(frequency_W), device=frequency_W.device, dtype=torch.float32)
    return 1 - ((pair_W - first) / width).clamp(0, 1)
