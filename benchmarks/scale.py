"""What does a rank of 1,024 do and send in a step? On paper, without a second rank.

    python -m benchmarks.scale

The shipped 3B models under each strategy that cuts parameters, on a fake process group with tensors
that have shapes and no memory; the trainer, the strategies and the optimizer are the real ones. A
step of one sequence a rank, in bf16. Counted: collectives by kind and axis with the bytes that a
rank sends, the operators that a step dispatches, and what a rank keeps; beside it what theory says
(`benchmarks._traffic`), and what the ranks tell each other beside training (`benchmarks._control`).

``collectives_growth``, ``operators_growth``: of a step on the most ranks over the same on the
fewest, the worst of all setups; 1 where a rank's work does not grow. ``over_theory``: bytes sent
over what theory asks for, the worst row. ``over_bound``: the same, more or less, with what static
shapes add; 1 where every byte is accounted for. ``unforeseen``: 1 + collectives of which theory
knows nothing.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks._control import save_cost, store_cost
from benchmarks._harness import finish, fix_threads
from benchmarks._paper import Paper, Traffic, trace
from benchmarks._traffic import Theory, theory
from modtrain.common.errors import ConfigError
from modtrain.parallel.config import PRESETS

MIB, GIB = 2**20, 2**30
MODELS = ("mod_3b", "staged_3b", "integrated_3b")
# Behind a slash stand degrees, with their kinds where the strategy's name does not say it.
SETUPS = (
    *("fsdp", "hsdp/8", "hsdp/64", "fsdp_ep/8", "fsdp_ep/16", "fsdp_tp/4", "fsdp_cp/8"),
    *("fsdp/tp4/cp8", "hsdp/16/tp4", "hsdp/8/cp8"),
    *("fsdp/ep16/tp4", "fsdp/ep16/cp8", "hsdp/64/ep16"),
)
_DEGREES = {"tp": "tensor_parallel", "cp": "context_parallel", "ep": "expert_parallel"}


class Traced(NamedTuple):
    """One model under one setup on so many ranks."""

    model: str
    setup: str
    world_size: int
    paper: Paper
    theory: dict[tuple[str, str], Theory]


def main() -> None:
    """Trace everything, print the tables, and the result as JSON on the last line."""
    options = _options()
    fix_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    traced = list(_traced(options))
    largest = max(options.worlds)
    print(f"rank {options.rank}, one sequence of {options.seq_len} tokens a rank, bf16\n")
    print_steps([one for one in traced if one.world_size == largest])
    print_growth([one for one in traced if one.model in options.growth])
    print_control(
        [one for one in traced if one.model in options.growth and one.world_size == largest],
        options.worlds,
    )
    finish("scale", _results(traced, largest))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--worlds", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of conf/model")
    parser.add_argument("--growth", nargs="*", default=["staged_3b"], help="also on fewer ranks")
    parser.add_argument(
        "--setups", nargs="+", default=list(SETUPS), help="strategy/degree/..., as hsdp/8/tp4"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=0, help="which one is traced")
    parser.add_argument("--set", nargs="+", default=[], help="more overrides of modtrain train")
    options = parser.parse_args()
    if not 0 <= options.rank < min(options.worlds):
        parser.error(f"--rank is one of {min(options.worlds)}")
    return options


def _traced(options: argparse.Namespace) -> Iterator[Traced]:
    """Trace every model under every setup that can train it, on fewer ranks first."""
    for model in options.models:
        for setup in options.setups:
            worlds = sorted(options.worlds)
            for world_size in worlds if model in options.growth else worlds[-1:]:
                lines = [f"model={model}", "precision=bf16", *overrides(setup), *options.set]
                try:
                    paper = trace(world_size, options.rank, options.seq_len, lines)
                except ConfigError:
                    # Groups that do not divide the ranks, or no experts to spread.
                    continue
                yield Traced(model, setup, world_size, paper, theory(paper))


def overrides(setup: str) -> list[str]:
    """Return what sets a strategy, with its degrees behind slashes: ``fsdp/tp4/cp8``."""
    name, *degrees = setup.split("/")
    lines = [f"strategy={name}"]
    for degree in degrees:
        kind = degree.rstrip("0123456789")
        key = _DEGREES[kind] if kind else PRESETS[name].default
        lines.append(f"strategy.{key}={degree.removeprefix(kind)}")
    return lines


def print_steps(traced: Sequence[Traced]) -> None:
    """Print what a step sends and what a rank keeps."""
    print(
        f"{'model':<14} {'strategy':<13} {'collective':<15} {'axis':<12} {'ranks':>5} {'number':>6}"
        f" {'MiB sent':>10} {'in theory':>10} {'ratio':>6}"
    )
    for one in traced:
        paper = one.paper
        for key in sorted(paper.traffic.keys() | one.theory.keys()):
            counted = paper.traffic.get(key, Traffic(0, 0.0))
            expected = one.theory.get(key, Theory())
            over = f"{counted.sent / expected.sent:6.3f}" if expected.sent else f"{'-':>6}"
            print(
                f"{one.model:<14} {one.setup:<13} {key[0]:<15} {key[1]:<12}"
                f" {paper.sizes[key[1]]:>5} {counted.number:>6} {counted.sent / MIB:>10.3f}"
                f" {expected.sent / MIB:>10.3f} {over}"
            )
    print()


def print_growth(traced: Sequence[Traced]) -> None:
    """Print how a rank's share of a step changes with the number of ranks."""
    print(
        f"{'model':<14} {'strategy':<13} {'ranks':>5} {'collectives':>11}"
        f" {'MiB sent':>9} {'GiB of parameters':>17} {'gradients':>9} {'optimizer':>9}"
    )
    for one in traced:
        paper, state = one.paper, one.paper.state
        print(
            f"{one.model:<14} {one.setup:<13} {one.world_size:>5} {_collectives(one):>11}"
            f" {sum(t.sent for t in paper.traffic.values()) / MIB:>9.0f}"
            f" {state['parameters'] / GIB:>17.3f} {state['gradients'] / GIB:>9.3f}"
            f" {state['optimizer'] / GIB:>9.3f}"
        )
    print()


def print_control(traced: Sequence[Traced], worlds: Sequence[int]) -> None:
    """Print what saves and the watchdog's store cost."""
    print(
        f"{'model':<14} {'strategy':<13} {'ranks':>5} {'entries of a save':>17}"
        f" {'MiB sent to rank 0':>18} {'MiB of metadata':>15}"
    )
    for one in traced:
        cost = save_cost(one.paper.items, one.world_size)
        print(
            f"{one.model:<14} {one.setup:<13} {one.world_size:>5} {cost.entries:>17}"
            f" {cost.plan_bytes / MIB:>18.1f} {cost.metadata / MIB:>15.1f}"
        )
    print(f"\n{'ranks':>5}  requests of a rank to the store: a heartbeat, and a broken collective")
    for world_size in sorted(worlds):
        store = store_cost(world_size)
        print(f"{world_size:>5} {store.heartbeat:>7} {store.failure:>7}")


def _collectives(one: Traced) -> int:
    return sum(traffic.number for traffic in one.paper.traffic.values())


def _results(traced: Sequence[Traced], largest: int) -> dict[str, float]:
    growth = {"collectives_growth": 0.0, "operators_growth": 0.0}
    over_theory, over_bound, unforeseen = 0.0, 0.0, 0
    fewest: dict[tuple[str, str], Traced] = {}
    for one in traced:
        # Where a group is of one rank, it sends nothing: such are left out.
        if 1 in one.paper.sizes.values():
            continue
        first = fewest.setdefault((one.model, one.setup), one)
        for name, value in (
            ("collectives_growth", _collectives(one) / _collectives(first)),
            ("operators_growth", one.paper.operators / first.paper.operators),
        ):
            growth[name] = max(growth[name], value)
    for one in traced:
        for key, traffic in one.paper.traffic.items():
            expected = one.theory.get(key)
            if expected is None:
                # What goes over a group of one goes nowhere.
                unforeseen += traffic.number if one.paper.sizes[key[1]] > 1 else 0
            elif expected.sent:
                over_theory = max(over_theory, traffic.sent / expected.sent)
                ratio = traffic.sent / expected.bound
                over_bound = max(over_bound, ratio, 1 / ratio)
    return {
        "ranks": largest,
        "traced": len(traced),
        **growth,
        "over_theory": over_theory,
        "over_bound": over_bound,
        "unforeseen": 1 + unforeseen,
    }


if __name__ == "__main__":
    main()
