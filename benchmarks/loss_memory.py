"""What do chunks save the head and its loss in memory, and cost in time? Against whole logits.

    python -m benchmarks.loss_memory

Forward and backward of the output head with cross-entropy, in float32: `next_token_loss`, and
``F.cross_entropy`` of whole logits. ``memory_ratio``: peak memory of the first over the second,
less what was there before, each in a process of its own (resident memory of the process; on CUDA
what torch allocated). ``time_ratio``: the same of their times, in turns in one process.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import finish, fix_threads, interleave, print_times, ratio
from modtrain.models.loss import next_token_loss

VARIANTS = ("chunked", "whole")


def main() -> None:
    """Measure, print bytes and times, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    if options.measure:
        print(_peak_bytes(_step(options, options.measure)))
        return
    device = _device()
    print(
        f"{options.tokens} tokens, d_model {options.d_model}, vocabulary {options.vocab},"
        f" on {device}, {options.threads} threads"
    )
    # First, as a child's peak starts at its parent's.
    peaks = {name: _peak_in_child(name) for name in VARIANTS}
    for name, peak in peaks.items():
        print(f"  {name:<8}{peak / 2**20:>10.0f} MiB at the peak")
    seconds = interleave({name: _step(options, name) for name in VARIANTS}, options.rounds)
    print_times("forward and backward", seconds)
    finish(
        "loss_memory",
        {
            "memory_ratio": peaks["chunked"] / peaks["whole"],
            "time_ratio": ratio(seconds["chunked"], seconds["whole"]),
        },
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--chunk", type=int, help="tokens at a time; left out: as in training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", choices=VARIANTS, help="print this one's peak bytes alone")
    options = parser.parse_args()
    sizes = (options.tokens, options.d_model, options.vocab, options.rounds, options.threads)
    if min(sizes) < 1 or (options.chunk is not None and options.chunk < 1):
        parser.error("every number must be at least 1")
    return options


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _step(options: argparse.Namespace, variant: str) -> Callable[[], None]:
    """Return the call to measure; the inputs are there before it."""
    torch.manual_seed(0)
    device = _device()
    x_ND = torch.randn(options.tokens, options.d_model, device=device, requires_grad=True)
    weight_VD = torch.randn(options.vocab, options.d_model, device=device).mul_(0.02)
    weight_VD.requires_grad_()
    targets_N = torch.randint(options.vocab, (options.tokens,), device=device)

    def loss() -> Tensor:
        if variant == "chunked":
            return next_token_loss(x_ND, weight_VD, targets_N, options.chunk)
        return F.cross_entropy(F.linear(x_ND, weight_VD), targets_N)

    def step() -> None:
        torch.autograd.grad(loss(), [x_ND, weight_VD])
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _peak_bytes(step: Callable[[], None]) -> int:
    """Return how much more memory than before ``step`` took at its peak."""
    # Libraries' workspaces and threads hold no activations.
    warm = torch.randn(64, 64, device=_device(), requires_grad=True)
    torch.autograd.grad((warm @ warm).sum(), warm)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_peak()
    step()
    return _resident_peak() - before


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_in_child(variant: str) -> int:
    command = [sys.executable, "-m", "benchmarks.loss_memory", *sys.argv[1:], "--measure", variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


if __name__ == "__main__":
    main()
