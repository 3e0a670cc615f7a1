"""Small corpora for the tests of the data layer."""

import json
import random
from pathlib import Path
from typing import Any

from modtrain.data.config import PrepareConfig, TokenizerConfig
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.stream.prepared import INDEX_NAME, SIDE_FILES

WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "with", "as"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Distinct documents of a few hundred characters."""
    draw = random.Random(seed)
    return [
        f"Document {seed}-{number}.\n" + " ".join(draw.choices(WORDS, k=draw.randint(20, 120)))
        for number in range(count)
    ]


def write_jsonl(path: Path, documents: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    return path


def tiny_config(sources: list[Path] | list[str], output: Path, **changes: Any) -> PrepareConfig:
    """Several shards of several samples, and some held-out documents, from a tiny corpus."""
    defaults: dict[str, Any] = {
        "tokenizer": TokenizerConfig(vocab_size=300),
        "seq_len": 16,
        "sequences_per_sample": 4,
        "samples_per_shard": 32,
        "valid_fraction": 0.2,
        "num_workers": 1,
    }
    names = [str(source) for source in sources]
    return PrepareConfig(sources=names, output=str(output), **{**defaults, **changes})


def prepare_packed(folder: Path, num_documents: int, seq_len: int) -> Path:
    """Prepare documents that are packed by best fit, and return the directory."""
    corpus = write_jsonl(folder / "corpus.jsonl", make_documents(num_documents))
    config = tiny_config([corpus], folder / "output", seq_len=seq_len, packing="best_fit")
    prepare(config, progress=False)
    return folder / "output"


def trained_on(output: Path) -> dict[str, object]:
    """What training reads of prepared data: all but the records of where documents came from."""
    files: dict[str, object] = {k: v for k, v in tree(output).items() if not k.startswith(".")}
    for name in SIDE_FILES:
        del files[name]
    index = json.loads((output / INDEX_NAME).read_text())
    del index["side_files"]
    return files | {INDEX_NAME: index}


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones included, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }
