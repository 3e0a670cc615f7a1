"""From a prepared directory to batches: the samples, the data module."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from modtrain.common.errors import ConfigError, DataError
from modtrain.data.config import DataConfig
from modtrain.data.stream.batch import Batch, document_numbers
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.dataset import TokenDataset
from modtrain.data.stream.index import ShardIndex
from modtrain.data.stream.index_json import read_summary
from tests.helpers.saved import flip_bit


@pytest.fixture(scope="module")
def rows(prepared: Path) -> np.ndarray:
    """All stored training sequences (N, T + 1), as webdataset reads them."""
    shards = [str(path) for path in sorted((prepared / "train").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode()
    return np.concatenate([sample["tokens.npy"] for sample in samples])


def module(path: Path, *, num_steps: int = 6, **changes: Any) -> TokenDataModule:
    sizes = {"micro_batch_size": 3, "accumulate": 2, "eval_batch_size": 4}
    sizes |= {key: changes.pop(key) for key in list(changes) if key in (*sizes, "eval_sequences")}
    return TokenDataModule(DataConfig(path=str(path), **changes), num_steps=num_steps, **sizes)


def on_rank(data: TokenDataModule, world_size: int, rank: int) -> TokenDataModule:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size, global_rank=rank, distributed_sampler_kwargs=None
    )
    return data


# Samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [None, 16, 8, 4, 1])
def test_samples_are_the_stored_sequences_or_parts_of_them(prepared, rows, seq_len):
    data = TokenDataset(ShardIndex.load(prepared), "train", seq_len)
    length = seq_len or 16
    parts = 16 // length
    assert len(data) == len(rows) * parts
    expected = np.stack(
        [row[k * length : (k + 1) * length + 1] for row in rows for k in range(parts)]
    )
    samples = data.__getitems__(list(range(len(data))))
    assert samples.dtype == torch.int64
    assert samples.tolist() == expected.tolist()
    assert data[len(data) - 1].tolist() == expected[-1].tolist()


def test_a_sample_outside_the_split_is_refused(prepared):
    data = TokenDataset(ShardIndex.load(prepared), "valid")
    for number in (-1, len(data)):
        with pytest.raises(IndexError):
            data[number]


def test_a_batch_can_be_changed_without_changing_the_shard(prepared):
    data = TokenDataset(ShardIndex.load(prepared), "train")
    before = data[0].tolist()
    data[0].zero_()
    assert data[0].tolist() == before


def test_a_pickled_data_set_is_small_and_reads_the_same(prepared):
    data = TokenDataset(ShardIndex.load(prepared), "train")
    expected = data.__getitems__([5, 0, 17]).tolist()
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).__getitems__([5, 0, 17]).tolist() == expected


def test_a_length_that_does_not_fit_is_refused(prepared):
    with pytest.raises(ConfigError, match=r"data\.seq_len"):
        TokenDataset(ShardIndex.load(prepared), "train", 5)


@pytest.mark.parametrize("what", ["magic", "shape", "dtype", "short"])
def test_a_shard_damaged_after_the_index_was_read_is_refused(copy, what):
    data = TokenDataset(ShardIndex.load(copy), "train")
    path = copy / "train" / "shard-000000.tar"
    content = path.read_bytes()
    changed = {
        "magic": content.replace(b"NUMPY", b"PICKL", 1),
        "shape": content.replace(b"(4, 17)", b"(5, 17)", 1),
        "dtype": content.replace(b"'<u2'", b"'|O' ", 1),
        "short": content[:-512],
    }[what]
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        data[0]


def test_a_token_that_the_tokenizer_does_not_have_is_named(copy):
    """As an embedding's row it would be an IndexError, or a stranger's memory."""
    data = TokenDataset(ShardIndex.load(copy), "train")
    shard, first = data.locate(5)
    with shard.open("r+b") as file:
        file.seek(first + 2 * 7 + 1)
        file.write(b"\x7f")
    damaged = TokenDataset(ShardIndex.load(copy), "train")
    assert damaged[4].equal(data[4])
    words = rf"{shard}: token 7 of sample 5, at byte {first + 14}, is 32\d+; the tokenizer has 300"
    with pytest.raises(DataError, match=words):
        damaged.__getitems__([4, 5, 6])


# Data module ----------------------------------------------------------------------------------


def tokens_of(batch: Batch) -> torch.Tensor:
    """The tokens (B, S + 1) that a batch was made of."""
    assert torch.equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
    return torch.cat([batch.inputs_BS, batch.targets_BS[:, -1:]], dim=1)


def test_a_batch_numbers_documents_where_they_are_masked(prepared):
    plain = next(iter(module(prepared).train_dataloader()))
    assert plain.documents_BS is None
    eos_id = int(plain.inputs_BS[0, 5])
    masked = next(iter(module(prepared, document_mask=True, eos_id=eos_id).train_dataloader()))
    assert torch.equal(masked.documents_BS, document_numbers(plain.inputs_BS, eos_id))
    assert masked.documents_BS[0, 6] > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_follow_the_order_and_resume_at_any_step(prepared, rows, num_workers):
    data = module(prepared, num_workers=num_workers)
    batches = list(map(tokens_of, data.train_dataloader()))
    assert len(batches) == 6 * 2
    assert all(batch.shape == (3, 17) and batch.dtype == torch.int64 for batch in batches)
    numbers = [number for step in range(6) for number in data.sample_numbers(step)]
    assert torch.cat(batches).tolist() == rows[numbers].tolist()

    resumed = module(prepared, num_workers=num_workers)
    resumed.start_step = 4
    loader = resumed.train_dataloader()
    assert len(loader) == 12
    assert [tokens_of(batch).tolist() for batch in loader] == [b.tolist() for b in batches[8:]]


def test_ranks_share_a_step(prepared):
    alone = module(prepared, micro_batch_size=6, accumulate=2)
    expected = [tokens_of(batch).tolist() for batch in alone.train_dataloader()]
    ranks = [on_rank(module(prepared, micro_batch_size=3), 2, rank) for rank in (0, 1)]
    assert ranks[1].sample_numbers(3) == alone.sample_numbers(3)
    pairs = zip(*(map(tokens_of, rank.train_dataloader()) for rank in ranks), strict=True)
    assert [torch.cat(pair).tolist() for pair in pairs] == expected


def test_the_strategy_decides_which_ranks_read_the_same(prepared):
    """Two tensor-parallel ranks of four are one data-parallel rank."""
    data = on_rank(module(prepared), 4, 3)
    data.trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": 1}  # type: ignore
    assert (data.plan().world_size, data.plan().rank) == (2, 1)


def test_epochs_follow_one_another(prepared):
    size = read_summary(prepared).splits["train"].num_sequences
    data = module(prepared, micro_batch_size=1, accumulate=size, num_steps=2)
    first, second = data.sample_numbers(0), data.sample_numbers(1)
    assert sorted(first) == sorted(second) == list(range(size))
    assert first != second
    assert first != list(range(size))
    ordered = module(prepared, micro_batch_size=1, accumulate=size, shuffle=False)
    assert ordered.sample_numbers(1) == list(range(size))


@pytest.mark.parametrize("eval_sequences", [None, 10, 10**9])
def test_validation_reads_the_first_samples_in_order(prepared, eval_sequences):
    data = module(prepared, eval_sequences=eval_sequences)
    samples = data.valid_data
    expected = samples.__getitems__(list(range(min(len(samples), eval_sequences or 10**9))))
    batches = list(map(tokens_of, data.val_dataloader()))
    assert torch.cat(batches).tolist() == expected.tolist()
    assert {len(batch) for batch in batches[:-1]} == {4}
    loaders = [on_rank(data, 3, rank).val_dataloader() for rank in range(3)]
    per_rank = [list(map(tokens_of, loader)) for loader in loaders]
    assert len({len(batches) for batches in per_rank}) == 1
    rows = [row for batches in per_rank for row in torch.cat(batches).tolist()]
    assert sorted(rows) == sorted(expected.tolist())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_leave_the_global_random_state_alone(prepared, num_workers):
    before = torch.get_rng_state()
    data = module(prepared, num_workers=num_workers, num_steps=1)
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_of_the_stream(prepared):
    same = module(prepared, micro_batch_size=7).fingerprint
    assert module(prepared, num_workers=2).fingerprint == same
    others = [
        module(prepared, **change) for change in ({"seed": 1}, {"shuffle": False}, {"seq_len": 8})
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 4


def test_verify_reaches_the_shards(copy):
    flip_bit(copy / "train" / "shard-000000.tar", 700)
    module(copy).train_dataloader()
    with pytest.raises(DataError, match="SHA-256"):
        module(copy, verify="sha256").train_dataloader()
