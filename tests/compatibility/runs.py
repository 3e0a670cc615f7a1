"""The kept runs, and what is compared of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modtrain.common.renamed_keys import RENAMED_KEYS
from tests.parity.program import Program

FOLDER = Path(__file__).parent
PREPARE = (
    *("corpus=files", "output=prepared", "sources=[corpus/*.txt]", "num_workers=1"),
    *("tokenizer.vocab_size=257", "seq_len=32", "valid_fraction=0.2"),
    *("sequences_per_sample=16", "samples_per_shard=64"),
)
_TRAIN = (
    *("runs_dir=.", "data.path=prepared", "log=jsonl", "log.every=1", "log.progress=false"),
    *("model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.d_ff=16"),
    *("model.tie_embeddings=true", "model.capacity=0.25", "model.router.predictor_dim=8"),
    *("budget.steps=24", "batch.tokens=128", "batch.micro_batch_size=2", "optimizer.lr=0.01"),
    *("checkpoint.every=8", "eval.every=12", "eval.sequences=8"),
    *("strategy.accelerator=cpu", "strategy.num_threads=1"),
)
# In the spelling of today's configuration: `keys_of` has that of a commit.
TRAIN: dict[str, tuple[str, ...]] = {
    "mod": (
        *_TRAIN,
        *("model.router.target=both", "model.router.causal=[predictor,threshold,auxiliary]"),
        *("model.router.gate=sigmoid", "capacity_schedule=linear"),
    ),
    "staged_fsdp": (
        *_TRAIN,
        *("strategy=fsdp", "model.router.choice=token", "model.router.capacity_factor=1.5"),
        *("model.mixer=[attention,convolution]", "model.experts.count=4", "model.experts.dim=8"),
        *("model.experts.balance=bias", "model.experts.noop=2", "schedule=wsd"),
        *("data.document_mask=true", "spike=skip"),
    ),
}
PROCESSES = {"mod": 1, "staged_fsdp": 2}


def keys_of(root: Path, overrides: Iterable[str]) -> list[str]:
    """Return the overrides with the keys that the program in ``root`` has, later renamed or not."""
    table = root / "modtrain/common/renamed_keys.py"
    renamed = table.read_text() if table.exists() else ""
    old_keys = {new: old for old, new in RENAMED_KEYS.items() if f'"{old}"' not in renamed}
    pairs = (text.split("=", 1) for text in overrides)
    return [f"{old_keys.get(key, key)}={value}" for key, value in pairs]


def results_of(program: Program, name: str) -> dict[str, Any]:
    """Evaluate and continue texts with a stopped run, then resume it to its end."""
    figures = program.evaluate(name)
    generated = program.generate(name, "sampling.temperature=0.5", "max_tokens=12")
    overrides = keys_of(program.root, TRAIN[name])
    program.run("train", f"name={name}", *overrides, processes=PROCESSES[name])
    return {
        "evaluation": {key: figures[key] for key in ("step", "tokens", "causal_loss")},
        "generated": generated,
        "metrics": program.metrics(name),
        "weights": program.weights_digest(name),
    }
