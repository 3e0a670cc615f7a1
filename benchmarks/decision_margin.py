"""How often does rounding decide? Cached decoding against the full causal forward pass.

    python -m benchmarks.decision_margin

A token takes part where the value that a router decides by exceeds its level. With a cache the same
value comes out of other shapes and in another order, so it differs by rounding; where it lies that
near to its level, the two passes part. The quickstart's MoD model is trained for some steps on the
State of the Union addresses. Held-out text then runs through the full pass, and through a cache a
token at a time, in float32 and under bf16 autocast, by each of two causal decisions. What comes
behind a sequence's first difference differs for more than rounding, and is not counted.

``parted_fp32``, ``parted_bf16``: decisions that differ, per million, over both causal decisions.
``expected_…``: as many as the density of values at their level, times the mean rounding there, lets
expect; the more exact figure where few differ. ``rounding_…``: the mean of |cached - full|.
``sequences_…``: share of the sequences in which any decision differs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._harness import finish, fix_threads, prepare_words
from modtrain.cli.compose import compose
from modtrain.data.prepare.pipeline import prepare
from modtrain.inference.config import EvalRunConfig
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.models.cache.cache import Cache
from modtrain.models.depth.config import Selection
from modtrain.models.transformer import ModelOutput, Transformer
from modtrain.training.run import train

DECISIONS: tuple[Selection, ...] = ("predictor", "threshold")
PRECISIONS = {"fp32": False, "bf16": True}
# The share of the values, the nearest ones, by which their density at the level is estimated.
NEAREST = 0.02


def main() -> None:
    """Train, measure, print the distributions, and the result as JSON on the last line."""
    options = _options()
    fix_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = _trained(Path(folder), options)
        batches = [batch.inputs_BS for batch in run.held_out(options.sequences, options.batch)]
    result: dict[str, float] = {}
    for precision, autocast in PRECISIONS.items():
        all_pairs = []
        for selection in DECISIONS:
            pairs = _Pairs.of(list(_compared(run.model, batches, selection, autocast)))
            pairs.show(f"{precision}, {selection}")
            all_pairs.append(pairs)
        result |= {
            f"{key}_{precision}": value for key, value in _Pairs.of(all_pairs).figures().items()
        }
    finish("decision_margin", result, digits=10)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="quickstart", help="of conf/model, with depth routers")
    parser.add_argument("--corpus", default="sotu", help="of conf/corpus; words: a few made ones")
    parser.add_argument("--steps", type=int, default=200, help="of training, 2,048 tokens each")
    parser.add_argument("--sequences", type=int, default=256, help="held-out ones")
    parser.add_argument("--batch", type=int, default=64, help="sequences at once")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if min(options.steps, options.sequences, options.batch, options.threads) < 1:
        parser.error("every number must be at least 1")
    return options


def _trained(folder: Path, options: argparse.Namespace) -> LoadedRun:
    if options.corpus == "words":
        prepare_words(folder, 64)
    else:
        words = [f"corpus={options.corpus}", f"output={folder}/data"]
        prepare(compose("prepare", words), progress=False)
    overrides = {
        "name": "mod",
        "runs_dir": folder,
        "model": options.model,
        "model.router.causal": f"[{','.join(DECISIONS)}]",
        "data.path": folder / "data",
        "budget.steps": options.steps,
        "batch.tokens": 2048,
        "batch.micro_batch_size": 8,
        "optimizer.lr": 4e-3,
        "strategy.accelerator": "cpu",
        "strategy.num_threads": options.threads,
    }
    outcome = train(compose("train", [f"{key}={value}" for key, value in overrides.items()]))
    if outcome.exit_code:
        raise SystemExit(outcome.exit_code)
    return load_run(EvalRunConfig(run="mod", runs_dir=str(folder), accelerator="cpu"))


@dataclass
class _Pairs:
    """The same decisions in a full and in a cached pass.

    distance_N: of the full pass's value from its level. rounding_N: between the two passes' values.
    num_parted: sequences with a decision that differs, of num_sequences.
    """

    distance_N: Tensor
    rounding_N: Tensor
    num_parted: int
    num_sequences: int

    @classmethod
    def of(cls, parts: Sequence[_Pairs]) -> _Pairs:
        """Join several."""
        return cls(
            torch.cat([part.distance_N for part in parts]),
            torch.cat([part.rounding_N for part in parts]),
            sum(part.num_parted for part in parts),
            sum(part.num_sequences for part in parts),
        )

    def figures(self) -> dict[str, float]:
        """Return what the result tells; rates are per million decisions."""
        reach = self.distance_N.quantile(NEAREST)
        is_near_N = self.distance_N <= reach
        # Of values spread evenly on both sides, those cross that lie nearer than they are moved.
        density = is_near_N.double().mean() / (2 * reach)
        return {
            "parted": 1e6 * self.num_parted / len(self.distance_N),
            "expected": 1e6 * float(density * self.rounding_N[is_near_N].mean()),
            "rounding": float(self.rounding_N.mean()),
            "sequences": self.num_parted / self.num_sequences,
        }

    def show(self, title: str) -> None:
        """Print how far values lie from their levels, and how far rounding moves them."""
        count = len(self.distance_N)
        expected = self.figures()["expected"] * count / 1e6
        print(f"{title}: {count:,} decisions, {self.num_parted} differ, {expected:.2g} expected")
        print(f"  {self.num_parted} of {self.num_sequences} sequences part")
        for name, x_N, points in (
            ("|value - level|", self.distance_N, (0.001, 0.01, 0.5)),
            ("rounding", self.rounding_N, (0.5, 0.99, 1.0)),
        ):
            shown = ", ".join(f"{float(x_N.quantile(p)):.1e} ({p:.1%})" for p in points)
            print(f"  {name:<16}{shown}")


@torch.inference_mode()
def _compared(
    model: Transformer, batches: Sequence[Tensor], selection: Selection, autocast: bool
) -> Iterator[_Pairs]:
    for tokens_BS in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            full = _decided(model, model(tokens_BS, selection=selection), selection)
            cache = Cache(model.config, len(tokens_BS))
            steps = [
                _decided(model, model.extend(token_B1, cache, selection), selection)
                for token_B1 in torch.split(tokens_BS, 1, dim=1)
            ]
        cached = [torch.cat(parts, dim=1) for parts in zip(*steps, strict=True)]
        # In the order in which a sequence's decisions are taken.
        (chosen_BN, value_BN), (chosen_too_BN, value_too_BN) = (
            [x_BSR.flatten(1) for x_BSR in decided] for decided in (full, cached)
        )
        differs_BN = chosen_BN != chosen_too_BN
        # Only rounding lies between the two passes up to a sequence's first difference.
        counts_BN = differs_BN.long().cumsum(1) - differs_BN.long() == 0
        yield _Pairs(
            value_BN[counts_BN].abs(),
            (value_BN - value_too_BN)[counts_BN].abs(),
            int(differs_BN.any(1).sum()),
            len(tokens_BS),
        )


def _decided(
    model: Transformer, output: ModelOutput, selection: Selection
) -> tuple[Tensor, Tensor]:
    """Return who takes part, and the values less their levels in float64, both (B, S, R)."""
    values = [
        router.decision_values(selection, record.scores_BS, record.predictor_BS).double()
        - router.decision_threshold(selection)
        for router, record in zip(model.routers, output.routing, strict=True)
    ]
    chosen = [record.chosen_BS for record in output.routing]
    return torch.stack(chosen, dim=-1), torch.stack(values, dim=-1)


if __name__ == "__main__":
    main()
