"""Is a FLOP in a mixture of experts as quick as in a dense MLP? One layer, forward and backward.

    python -m benchmarks.moe_layer

- moe: experts by token choice, dropless.
- mode: the same with as many no-op experts beside them (integrated MoDE).
- moe_expert_choice: an expert takes its tokens of each sequence.

Each is timed against a dense MLP of about the FLOPs that it multiplies itself, all in float32 on
the CPU, eager, norm included. The ratio is (T_dense / T) * (F / F_dense), F as the FLOP counter
sees them, router included: at 1 a FLOP takes the same time in both. The router starts as in
training, so the load is uneven.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import (
    HEAD_WIDTH,
    check_width,
    finish,
    fix_threads,
    interleave,
    print_times,
    ratio,
)
from modtrain.models.config import ModelConfig
from modtrain.models.experts.config import ExpertsConfig
from modtrain.models.experts.layer import Experts
from modtrain.models.feed_forward import FeedForward
from modtrain.models.sequence import Output, SequenceContext, as_output, sequence_context


def main() -> None:
    """Measure, print times and FLOPs, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    token = ExpertsConfig(count=options.experts, top_k=options.top_k)
    mixtures = {
        "moe": token,
        "mode": replace(token, noop=options.noop),
        "moe_expert_choice": replace(token, choice="expert"),
    }
    x_BSD = _normal(options.batch, options.seq_len, options.d_model)
    context = _context(options)
    calls: dict[str, Callable[[], object]] = {}
    flops: dict[str, float] = {}
    for name, experts in mixtures.items():
        config = _config(options, experts)
        calls[name] = _pass(Experts(config), x_BSD, context)
        flops[name] = _flops(calls[name])
        # Three matrices, forward and twice that backward.
        dense_width = round(flops[name] / (3 * 3 * 2 * x_BSD.numel()))
        dense = FeedForward(replace(config, d_ff=dense_width))
        calls[f"dense of {name}"] = _pass(dense, x_BSD, context)
        flops[f"dense of {name}"] = _flops(calls[f"dense of {name}"])
    _print_flops(options, flops)
    seconds = interleave(calls, options.rounds)
    print_times("forward and backward", seconds)
    result = {}
    for name in mixtures:
        dense_name = f"dense of {name}"
        quicker = ratio(seconds[dense_name], seconds[name])
        result[name] = quicker * flops[name] / flops[dense_name]
    finish("moe_layer", result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=512, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2, help="experts a token")
    parser.add_argument("--noop", type=int, default=8, help="no-op experts of the second mixture")
    parser.add_argument("--rounds", type=int, default=9, help="passes of each variant")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    check_width(parser, options.d_model)
    if min(options.seq_len, options.batch, options.noop, options.threads, options.rounds) < 1:
        parser.error("--seq-len, --batch, --noop, --threads and --rounds must be at least 1")
    config = _config(options, ExpertsConfig(count=options.experts, top_k=options.top_k))
    if problems := config.problems():
        parser.error("; ".join(f"{problem}" for problem in problems))
    return options


def _config(options: argparse.Namespace, experts: ExpertsConfig) -> ModelConfig:
    return ModelConfig(
        d_model=options.d_model, num_heads=options.d_model // HEAD_WIDTH, experts=experts
    )


def _context(options: argparse.Namespace) -> SequenceContext:
    return sequence_context(torch.arange(options.seq_len).unsqueeze(0), HEAD_WIDTH, 1e4)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pass(module: nn.Module, x_BSD: torch.Tensor, context: SequenceContext) -> Callable[[], object]:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            if parameter.dim() > 1:
                parameter.copy_(_normal(*parameter.shape, seed=number) / x_BSD.shape[-1] ** 0.5)
    x_BSD = x_BSD.clone().requires_grad_()
    grad_BSD = _normal(*x_BSD.shape, seed=1)

    def call() -> None:
        module.zero_grad(set_to_none=True)
        x_BSD.grad = None
        output: Output = as_output(module(x_BSD, context))
        torch.autograd.backward(output.value_BSD, grad_BSD)

    return call


def _flops(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _print_flops(options: argparse.Namespace, flops: dict[str, float]) -> None:
    print(
        f"d_model {options.d_model}, {options.batch} x {options.seq_len} tokens,"
        f" {options.experts} experts, top {options.top_k}, {options.threads} threads"
    )
    for name, value in flops.items():
        print(f"  {name:<28}{value / 1e9:>8.1f} GFLOPs forward and backward")


if __name__ == "__main__":
    main()
