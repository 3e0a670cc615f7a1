import pytest
from omegaconf import OmegaConf

from modtrain.data.config import DataConfig, PrepareConfig, TokenizerConfig


def test_the_configs_are_structured_configs():
    composed = OmegaConf.merge(
        OmegaConf.structured(PrepareConfig),
        {"sources": ["a.txt"], "output": "out", "tokenizer": {"path": "t.json"}},
    )
    assert OmegaConf.to_object(composed) == PrepareConfig(
        sources=["a.txt"], output="out", tokenizer=TokenizerConfig(path="t.json")
    )
    assert OmegaConf.to_object(OmegaConf.structured(DataConfig(path="x"))) == DataConfig(path="x")


def test_good_configs_have_no_problems(prepared):
    for config in (DataConfig(str(prepared)), DataConfig(str(prepared), 8, verify="none")):
        assert config.problems("data") == config.shard_problems("data") == []
    assert PrepareConfig(sources=["a.txt"], output="out").problems() == []


def test_all_problems_of_a_prepare_are_reported_at_once():
    config = PrepareConfig(
        sources=[],
        output="",
        text_column="",
        text_template="none",
        token_dtype="int8",
        token_column="",
        max_flaws=-1,
        tokenizer=TokenizerConfig(vocab_size=256, train_bytes=0),
        seq_len=0,
        packing="tight",
        sequences_per_sample=0,
        samples_per_shard=0,
        valid_fraction=1.0,
        separator="",
        split_at="page",
        max_document_bytes=1,
        on_error="ignore",
        num_workers=-1,
        task="last",
        seed=-1,
    )
    keys = {problem.key for problem in config.problems()}
    # Either value of a bool is right.
    names = {*vars(config)} - {"tokenizer", "deduplicate"} | {
        "tokenizer.vocab_size",
        "tokenizer.train_bytes",
    }
    assert keys == names


def test_all_problems_of_the_data_are_reported_at_once(prepared):
    config = DataConfig(
        path=str(prepared), seq_len=5, seed=-1, num_workers=-1, prefetch_factor=0, verify="md5"
    )
    problems = [*config.problems("data"), *config.shard_problems("data")]
    assert {problem.key for problem in problems} == {
        f"data.{name}" for name in ("seq_len", "seed", "num_workers", "prefetch_factor", "verify")
    }


@pytest.mark.parametrize(
    ("seq_len", "words"), [(5, "does not divide"), (32, "is larger than"), (0, "is not 1 or more")]
)
def test_a_sequence_length_that_does_not_fit_the_shards(prepared, seq_len, words):
    config = DataConfig(path=str(prepared), seq_len=seq_len)
    (problem,) = [*config.problems("data"), *config.shard_problems("data")]
    assert problem.key == "data.seq_len"
    assert words in problem.reason
    if seq_len:
        assert str(seq_len) in str(problem)
        assert "16" in problem.reason


def test_missing_data_is_a_problem(tmp_path):
    (problem,) = DataConfig(path=str(tmp_path)).shard_problems("data")
    assert problem.key == "data.path"
    assert "modtrain prepare" in problem.reason


def test_prepared_data_are_written_to_a_disk():
    config = PrepareConfig(["a.txt"], output="s3://user:secret@bucket/mine")
    (problem,) = (problem for problem in config.problems() if problem.key == "output")
    assert "prepare writes to a disk" in problem.reason
    assert "aws s3 cp --recursive data/mine" in problem.remedy
    assert "secret" not in str(problem)
