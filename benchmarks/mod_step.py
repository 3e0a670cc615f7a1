"""Is a FLOP saved by routing a moment saved? Training steps of a dense and a routed model.

    python -m benchmarks.mod_step

Both models have the same shape; every other block of the second takes 12.5 % of the tokens. A step
is the forward pass with the predictor's auxiliary loss, the backward pass and fused AdamW, in
float32 on the CPU, eager and compiled. Retention is eta = (T_dense / T_MoD) / (F_dense / F_MoD), F
the executed training FLOPs: at 1 every FLOP saved is time saved. With --keep-kv a third model is
the routed one with keys and values of all tokens, compared with the routed one. The share of
choosing, gathering and putting back is that of the eager MoD step, from torch's profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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
from modtrain.models.depth.config import RouterConfig
from modtrain.models.flops import CONVENTIONS, forward_flops, training_flops_per_token
from modtrain.models.transformer import Transformer
from modtrain.optimizers.config import OptimizerConfig
from modtrain.optimizers.registry import build_optimizer

PATTERNS = {"dense": "dense", "mod": "every_other"}
# What routing adds: the choice, rows out of the stream and back into it, and their gradients.
MOVES = (
    *("topk", "sort", "argsort", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_"),
    *("index_select", "index_add", "index_add_", "index"),
)


def main() -> None:
    """Measure, print the times and the FLOPs, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    configs = {name: _config(options, pattern) for name, pattern in PATTERNS.items()}
    if options.keep_kv:
        configs["kept"] = replace(configs["mod"], router=RouterConfig(keep_kv=True))
    flops = {name: _training_flops(options, config) for name, config in configs.items()}
    _print_flops(options, configs, flops)
    result = {"flops_ratio": flops["dense"] / flops["mod"]}
    modes = ["eager"] if options.skip_compiled else ["eager", "compiled"]
    steps = {
        f"{name} {mode}": _step(options, config, compiled=mode == "compiled")
        for mode in modes
        for name, config in configs.items()
    }
    seconds = interleave(steps, options.rounds)
    print_times("a training step", seconds)
    for mode in modes:
        speedup = ratio(seconds[f"dense {mode}"], seconds[f"mod {mode}"])
        result[f"time_ratio_{mode}"] = speedup
        result[f"eta_{mode}"] = speedup / result["flops_ratio"]
    if options.keep_kv:
        result["keep_kv_flops_ratio"] = flops["kept"] / flops["mod"]
        for mode in modes:
            kept = ratio(seconds[f"kept {mode}"], seconds[f"mod {mode}"])
            result[f"keep_kv_time_ratio_{mode}"] = kept
    result["gather_scatter_share"] = _moving_share(steps["mod eager"])
    print(f"choosing, gathering, putting back: {result['gather_scatter_share']:.1%} of a MoD step")
    finish("mod_step", result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=512, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep-kv", action="store_true", help="measure router.keep_kv as well")
    parser.add_argument("--skip-compiled", action="store_true", help="measure eager steps alone")
    options = parser.parse_args()
    check_width(parser, options.d_model)
    if min(options.layers, options.seq_len, options.batch, options.vocab, options.threads) < 1:
        parser.error("--layers, --seq-len, --batch, --vocab and --threads must be at least 1")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _config(options: argparse.Namespace, pattern: str) -> ModelConfig:
    return ModelConfig(
        d_model=options.d_model,
        num_layers=options.layers,
        num_heads=options.d_model // HEAD_WIDTH,
        vocab_size=options.vocab,
        pattern=pattern,
        capacity=0.125,
    )


def _training_flops(options: argparse.Namespace, config: ModelConfig) -> float:
    tokens: int = options.batch * options.seq_len
    return tokens * training_flops_per_token(config, options.seq_len)


def _print_flops(
    options: argparse.Namespace, configs: dict[str, ModelConfig], flops: dict[str, float]
) -> None:
    print(
        f"d_model {options.d_model}, {options.layers} layers, {options.batch} x {options.seq_len}"
        f" tokens, vocabulary {options.vocab}, {options.threads} threads"
    )
    for name, config in configs.items():
        parts = forward_flops(config, options.seq_len)
        head = parts.head / parts.total
        print(f"  {name:<6}{flops[name] / 1e9:>10.1f} GFLOPs a training step, head {head:.1%}")
    print("FLOPs: " + "; ".join(CONVENTIONS))


def _step(options: argparse.Namespace, config: ModelConfig, compiled: bool) -> Callable[[], None]:
    model = Transformer(config)
    # torch.compile's own type says less than what it returns: the module, called alike.
    forward: Any = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = build_optimizer(model, OptimizerConfig())
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.seq_len + 1)
    batch_BT = torch.randint(options.vocab, shape, generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = forward(batch_BT[:, :-1], batch_BT[:, 1:])
        sum(output.auxiliary.values(), start=output.loss).backward()
        optimizer.step()

    return step


def _moving_share(step: Callable[[], None]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    times: dict[str, float] = {
        event.key: event.self_cpu_time_total for event in profiler.key_averages()
    }
    return sum(times.get(f"aten::{name}", 0) for name in MOVES) / sum(times.values())


if __name__ == "__main__":
    main()
