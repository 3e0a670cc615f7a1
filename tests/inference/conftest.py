"""What the tests of inference share."""

import pytest
from tokenizers import Tokenizer

from modtrain.cli.compose import compose
from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.training.run import train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level; what is not in its few words is spelt in bytes."""
    return Tokenizer.from_str(train_tokenizer(["the tree and the river"] * 4, 270).decode())


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """Train a run of a few steps, logged as JSON lines alone."""
    folder = tmp_path_factory.mktemp("runs")
    quick = ["eval.every=null", "log=jsonl", "log.progress=false", f"runs_dir={folder}"]

    def run(name, *more):
        return train(compose("train", [*tiny, *quick, f"name={name}", *more])).run

    return run


@pytest.fixture(scope="module")
def dense(start):
    return start("dense", "budget.steps=1", "model.pattern=dense")
