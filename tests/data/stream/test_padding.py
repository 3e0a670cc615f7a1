"""Samples that end with padding: what is read of them, and what they count for in a step."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import ConfigError, DataError
from modtrain.data.config import DataConfig
from modtrain.data.mixture.config import SourceConfig
from modtrain.data.mixture.stream import order_of
from modtrain.data.stream.batch import PADDING, Batch
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.prepared import INDEX_NAME
from tests.data.data_cases import prepare_packed

SEQ_LEN, STEPS = 128, 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_packed(tmp_path_factory.mktemp("packed"), 60, SEQ_LEN)


def test_padding_is_no_input_and_no_target() -> None:
    tokens_BT = torch.tensor([[5, 6, 0, 7, 0], [5, 0, PADDING, PADDING, PADDING]])
    batch = Batch.from_tokens(tokens_BT, eos_id=0, has_padding=True)
    assert batch.inputs_BS.min() >= 0
    assert batch.targets_BS.tolist() == [[6, 0, 7, 0], [0, -100, -100, -100]]
    assert batch.valid_BS.tolist() == [[True] * 4, [True, False, False, False]]
    assert batch.documents_BS[0].tolist() == [0, 0, 0, 1]
    assert batch.num_targets == 5
    # Whether there is a mask does not depend on the tokens: a graph is compiled for one of the two.
    whole = Batch.from_tokens(tokens_BT[:1], eos_id=0, has_padding=True)
    assert whole.masks().keys() == batch.masks().keys()


def datamodule(config: DataConfig, micro: int, accumulate: int, world: int, rank: int):
    data = TokenDataModule(
        config, micro_batch_size=micro, accumulate=accumulate, num_steps=STEPS, eval_batch_size=2
    )
    shares = {"num_replicas": world, "rank": rank}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=shares, num_nodes=1)
    return data


@pytest.mark.parametrize("is_mixture", [False, True])
def test_every_token_of_a_step_counts_alike(packed: Path, prepared: Path, is_mixture) -> None:
    """Whatever the micro-batches and ranks: a batch weighs as its tokens do among the step's."""
    config = DataConfig(str(packed))
    if is_mixture:
        sources = {"a": SourceConfig(str(packed)), "b": SourceConfig(str(packed))}
        config = DataConfig(sources=sources)
    expected = None
    for micro, accumulate, world in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
        tokens = np.zeros(STEPS)
        weights = []
        for rank in range(world):
            data = datamodule(config, micro, accumulate, world, rank)
            for number, batch in enumerate(data.train_dataloader()):
                tokens[number // accumulate] += batch.num_targets
                weights.append((number // accumulate, batch.num_targets, batch.weight))
        if expected is None:
            expected = tokens
        assert tokens.tolist() == expected.tolist()
        for step, count, weight in weights:
            assert weight == pytest.approx(count * accumulate * world / expected[step])
        shares = [1 - count / (8 * SEQ_LEN) for count in expected]
        assert [data.padding_share(step) for step in range(STEPS)] == pytest.approx(shares)


def test_the_order_of_a_mixture_is_planned_once(packed: Path, monkeypatch) -> None:
    sources = {"a": SourceConfig(str(packed)), "b": SourceConfig(str(packed))}
    data = datamodule(DataConfig(sources=sources), 2, 2, 1, 0)
    planned = []

    def plan(*arguments):
        planned.append(arguments[-1])
        return order_of(*arguments)

    monkeypatch.setattr("modtrain.data.stream.datamodule.order_of", plan)
    shares = [data.padding_share(step) for step in range(STEPS)]
    assert data.order is data.order and planned == [STEPS * 4]
    # Stages that begin at a share of the run depend on its length.
    data.num_steps += 1
    assert [data.padding_share(step) for step in range(STEPS)] == shares
    assert planned == [STEPS * 4, (STEPS + 1) * 4]


def test_a_run_that_starts_later_weighs_its_batches_alike(packed: Path) -> None:
    whole = [b.weight for b in datamodule(DataConfig(str(packed)), 2, 2, 1, 0).train_dataloader()]
    later = datamodule(DataConfig(str(packed)), 2, 2, 1, 0)
    later.start_step = 1
    assert [batch.weight for batch in later.train_dataloader()] == whole[2:]


def test_data_without_padding_have_neither_mask_nor_weight(prepared: Path) -> None:
    data = datamodule(DataConfig(str(prepared)), 2, 2, 1, 0)
    for batch in data.train_dataloader():
        assert (batch.valid_BS, batch.weight) == (None, None)
        assert batch.masks() == {"documents_BS": None}
    assert data.padding_share(0) is None


def test_another_sequence_length_is_refused(packed: Path, prepared: Path) -> None:
    index = ShardIndex.load(packed)
    with pytest.raises(ConfigError, match=r"data\.seq_len=64: is not 128, for which packing=best"):
        TokenDataset(index, "train", 64)
    (problem,) = DataConfig(str(packed), seq_len=64).shard_problems("data")
    assert problem.key == "data.seq_len"
    assert not DataConfig(str(packed), seq_len=SEQ_LEN).shard_problems("data")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train/rows.npy", lambda content: content[:-1], "rows.npy: has"),
        ("train/rows.npy", lambda _: None, "rows.npy: is missing"),
        ("train/rows.npy", lambda content: content[:-4] + b"\xff" * 4, "outside 1 to 129"),
        ("train/rows.npy", lambda content: content[:-4] + b"\1\0\0\0", "where rows.npy says"),
        ("train/pieces.npy", lambda _: None, "pieces.npy: is missing"),
    ],
)
def test_damaged_files_of_rows_are_named(packed: Path, tmp_path: Path, name, damage, words) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    damaged = damage((copy / name).read_bytes())
    (copy / name).unlink()
    if damaged is not None:
        (copy / name).write_bytes(damaged)

    def read() -> None:
        data = TokenDataset(ShardIndex.load(copy), "train")
        data.document_pieces(len(data) - 1)
        data[len(data) - 1]

    with pytest.raises(DataError) as caught:
        read()
    assert words in str(caught.value)
    with pytest.raises(DataError):
        ShardIndex.load(copy, "sha256")


def test_an_index_without_its_packing_is_refused(packed: Path, tmp_path: Path) -> None:
    content = json.loads((packed / INDEX_NAME).read_text())
    assert content["version"] == 2
    for without in ("packing", "side_files"):
        broken = {key: value for key, value in content.items() if key != without}
        (tmp_path / INDEX_NAME).write_text(json.dumps(broken))
        with pytest.raises(DataError, match=without):
            ShardIndex.load(tmp_path, "none")
    # Nor is it that of documents laid end to end.
    (tmp_path / INDEX_NAME).write_text(json.dumps({**content, "version": 1}))
    with pytest.raises(DataError, match="fingerprint"):
        ShardIndex.load(tmp_path, "none")


def test_side_files_are_those_of_the_index(packed: Path) -> None:
    for name, side in ShardIndex.load(packed).side_files.items():
        assert file_sha256(packed / name) == side.sha256
