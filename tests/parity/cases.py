"""The configurations whose results are recorded, as overrides of the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PREPARE = (
    *("corpus=files", "output=prepared", "sources=[corpus/*.txt]", "num_workers=1"),
    *("tokenizer.vocab_size=300", "seq_len=64", "valid_fraction=0.2"),
    *("sequences_per_sample=8", "samples_per_shard=4"),
)
# Ten steps of four sequences: one, or two processes with two each.
TRAIN = (
    *("runs_dir=.", "data.path=prepared", "log=jsonl", "log.every=1", "log.progress=false"),
    *("model=tiny", "budget.steps=10", "batch.tokens=256", "batch.micro_batch_size=2"),
    *("optimizer.lr=0.01", "checkpoint.every=4", "eval.every=5", "eval.sequences=8"),
    *("strategy.accelerator=cpu", "strategy.num_threads=1"),
)
_HALF = "inference.capacity=0.5"
_EXPERTS = ("model.experts.count=4", "model.experts.dim=32")


@dataclass(frozen=True)
class Case:
    """One run and what is asked of it.

    train: overrides beside `TRAIN`. processes: ranks under torchrun. killed: kill -9 it after a
    checkpoint and start it again. generate: a name and overrides of each generation from it.
    evaluate: overrides of an evaluation of it; None: no evaluation.
    """

    train: tuple[str, ...]
    processes: int = 1
    killed: bool = False
    generate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluate: tuple[str, ...] | None = None


CASES: dict[str, Case] = {
    # The longest ones first, which are run beside one another.
    "fsdp_tp": Case(
        ("strategy=fsdp_tp", "strategy.tensor_parallel=2", "model.num_kv_heads=2"), processes=2
    ),
    "fsdp": Case(("strategy=fsdp", *_EXPERTS, "model.experts.shared=1"), processes=2),
    "deepspeed_2": Case(("strategy=deepspeed_2",), processes=2),
    "mod_block": Case(
        (),
        generate={
            "greedy": ("sampling.greedy=true", "sampling.repetition_penalty=1.5", _HALF),
            "sampled": (
                *("sampling.temperature=0.8", "sampling.top_k=50", "sampling.top_p=0.9", _HALF),
            ),
            "speculated": ("speculate.tokens=3", "speculate.capacity=0.125", _HALF),
        },
    ),
    "mod_token_choice": Case(
        (
            *("model.router.choice=token", "model.router.capacity_factor=1.5"),
            *("model.mixer=convolution", "budget.steps=20"),
        ),
        killed=True,
        evaluate=("inference.layer_cap=0.2",),
    ),
    "mod_both": Case(
        (
            *("model.router.target=both", "model.router.gate=sigmoid", "model.pattern=ramp_down"),
            "model.router.causal=[threshold,auxiliary,predictor]",
        ),
        evaluate=(),
    ),
    "dense": Case(("model.pattern=dense", "model.qk_norm=true", "model.tie_embeddings=true")),
    "staged": Case((*_EXPERTS, "model.experts.capacity_factor=1.25", "schedule=wsd")),
    "integrated": Case(
        ("model.pattern=dense", *_EXPERTS, "model.experts.noop=4", "model.experts.balance=bias")
    ),
    "capacity_schedule": Case(("capacity_schedule=cosine", "model.router.score=mlp")),
    "document_mask": Case(("data.document_mask=true", "model.sliding_window=16")),
}
