"""Files of others are data: whatever is planted in a checkpoint or among the shards runs nothing.

Who can plant a pickle can plant its checksum as well, so the manifests here fit.
"""

import enum
import io
import os
import pickle
import resource
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
)

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import Manifest, checkpoint_path, verify
from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.recovery import latest, recover, whole_checkpoints
from modtrain.checkpoint.state import load_weights, model_tensors, read_rank_state, restore
from modtrain.common.atomic_io import file_sha256
from modtrain.common.errors import CheckpointError, DataError
from modtrain.data.config import DataConfig
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.data.stream.index import ShardIndex
from modtrain.distributed.process_group import Ranks
from tests.helpers.saved import load_whole


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def torch_pickle(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.fixture
def path(tmp_path) -> Path:
    root = tmp_path / "checkpoints"
    root.mkdir()
    checkpoint = checkpoint_path(root, 1)
    model = torch.nn.Linear(2, 2, bias=False)
    with Checkpointer(Ranks.create()) as checkpointer:
        checkpointer.save(checkpoint, model_tensors(model), {"n": 1}, 1, {"random": 5})
    return checkpoint


def planted(path: Path, name: str, content: bytes) -> None:
    (path / name).write_bytes(content)
    manifest = Manifest.read(path)
    entry = {"bytes": len(content), "sha256": file_sha256(path / name)}
    replace(manifest, files={**manifest.files, name: entry}).write(path)
    assert recover(path.parent) == (1, path)


def metadata(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def in_metadata(path, mark):
    planted(path, ".metadata", pickle.dumps(Hostile(mark)))


def in_the_rest(path, mark):
    planted(path, "state.pt", torch_pickle(Hostile(mark)))


def in_a_shard(path, mark):
    """Every tensor of the file is the pickle."""
    content, changed = torch_pickle(Hostile(mark)), metadata(path)
    for info in changed.storage_data.values():
        info.offset, info.length = 0, len(content)
    planted(path, "__0_0.distcp", content)
    planted(path, ".metadata", pickle.dumps(changed))


def as_bytes(path, mark):
    """The metadata says that the weight is bytes, which torch unpickles freely."""
    in_a_shard(path, mark)
    changed = metadata(path)
    for key in changed.state_dict_metadata:
        changed.state_dict_metadata[key] = BytesStorageMetadata()
    planted(path, ".metadata", pickle.dumps(changed))


def in_another_file(path, mark):
    outside = path.parent / "outside"
    outside.write_bytes(torch_pickle(Hostile(mark)))
    changed = metadata(path)
    for info in changed.storage_data.values():
        info.relative_path, info.offset, info.length = "../outside", 0, outside.stat().st_size
    planted(path, ".metadata", pickle.dumps(changed))


def in_a_rank_state(path, mark):
    content = torch.frombuffer(bytearray(torch_pickle(Hostile(mark))), dtype=torch.uint8)
    shutil.rmtree(path)
    with Checkpointer(Ranks.create()) as checkpointer:
        tensors = {"state_dict.weight": torch.ones(2, 2), "ranks.0.state": content}
        checkpointer.save(path, tensors, {}, 1)


PLANTED = [in_metadata, in_the_rest, in_a_shard, as_bytes, in_another_file, in_a_rank_state]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_hostile_checkpoint_runs_nothing(path, tmp_path, plant):
    mark = tmp_path / "it ran"
    plant(path, mark)
    model = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointError, match=r"more than plain data|cannot be read"):
        restore(path, model)
    if plant not in (in_the_rest, in_a_rank_state):
        with pytest.raises(CheckpointError, match=r"more than plain data|cannot be read"):
            load_weights(path, model)
    if plant is in_a_rank_state:
        with pytest.raises(CheckpointError, match="more than plain data"):
            read_rank_state(TensorReader(path), 0)
    else:
        with pytest.raises(CheckpointError):
            load_whole(path)
    assert not mark.exists()


class PicklesEnumsByGetattr(pickle._Pickler):
    """As Python 3.11.0 to 3.11.3 do, of which Debian 12 has one."""

    def reducer_override(self, value):
        if isinstance(value, enum.Enum):
            return getattr, (type(value), value.name)
        return NotImplemented


def pickled_by_getattr(value) -> bytes:
    file = io.BytesIO()
    PicklesEnumsByGetattr(file).dump(value)
    return file.getvalue()


def test_a_checkpoint_of_debians_python_is_read(path):
    content = pickled_by_getattr(metadata(path))
    assert b"getattr" in content
    before = TensorReader(path)["state_dict.weight"]
    planted(path, ".metadata", content)
    assert torch.equal(TensorReader(path)["state_dict.weight"], before)


class Attribute:
    """Of a class that checkpoints may name, one that is no member."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


@pytest.mark.parametrize(
    ("kind", "name"), [(Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")]
)
def test_getattr_gives_members_of_enumerations_alone(path, kind, name):
    changed = replace(metadata(path), planner_data=Attribute(kind, name))
    planted(path, ".metadata", pickle.dumps(changed))
    with pytest.raises(CheckpointError, match="more than plain data"):
        TensorReader(path)


class Large:
    """What `torch.load` builds although it loads weights only."""

    def __reduce__(self):
        return (bytearray, (2**34,))


def in_the_rest_by_name(path):
    planted(path, "state.pt", torch_pickle({"n": Large()}))


def in_the_rest_by_compression(path):
    """A gigabyte of zeros."""
    old, new = io.BytesIO(torch_pickle({"x": torch.zeros(1)})), io.BytesIO()
    with (
        zipfile.ZipFile(old) as source,
        zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for name in source.namelist():
            with target.open(name, "w") as file:
                for _ in range(256 if "/data/" in name else 0):
                    file.write(bytes(2**22))
                if "/data/" not in name:
                    file.write(source.read(name))
    planted(path, "state.pt", new.getvalue())


def in_the_memo_of_the_metadata(path):
    planted(path, ".metadata", b"\x80\x04Nr\x00\x00\x00\x40.")


def in_the_sizes_of_the_metadata(path):
    changed = metadata(path)
    for entry in changed.state_dict_metadata.values():
        entry.size = torch.Size([2**32])
        entry.chunks[0].sizes = torch.Size([2**32])
    planted(path, ".metadata", pickle.dumps(changed))


def in_a_shard_by_name(path):
    content, changed = torch_pickle({"n": Large()}), metadata(path)
    for info in changed.storage_data.values():
        info.offset, info.length = 0, len(content)
    planted(path, "__0_0.distcp", content)
    planted(path, ".metadata", pickle.dumps(changed))


LARGE = [
    in_the_rest_by_name,
    in_the_rest_by_compression,
    in_the_memo_of_the_metadata,
    in_the_sizes_of_the_metadata,
    in_a_shard_by_name,
]


@pytest.mark.parametrize("plant", LARGE)
def test_a_small_file_takes_no_large_memory(path, plant):
    plant(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        restore(path, torch.nn.Linear(2, 2, bias=False))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, f"{grown} KiB"
    assert "weights_only" not in str(error.value)


def test_a_file_of_others_is_not_read_even_if_harmless(path):
    changed = metadata(path)
    for key, info in changed.storage_data.items():
        if key.fqn == "state_dict.weight":
            content = (path / "__0_0.distcp").read_bytes()[info.offset :][: info.length]
            (path.parent / "outside").write_bytes(content)
            info.relative_path, info.offset = "../outside", 0
    planted(path, ".metadata", pickle.dumps(changed))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_weights(path, torch.nn.Linear(2, 2, bias=False))


def test_the_pickles_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "one")))
    torch.load(io.BytesIO(torch_pickle(Hostile(tmp_path / "two"))), weights_only=False)
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.parametrize("name", ["../state.pt", "/etc/passwd", "..", "", "a/b"])
def test_a_manifest_that_names_files_elsewhere_is_skipped(path, name):
    manifest = Manifest.read(path)
    manifest.files[name] = manifest.files["state.pt"]
    manifest.write(path)
    with pytest.raises(CheckpointError, match="outside"):
        verify(path)
    assert latest(path.parent) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"format": 3, "step": 1, "files": [1]}', '{"files": {"a": 1}}'],
)
def test_what_is_no_manifest_is_passed_over(path, text):
    (path / "manifest.json").write_text(text)
    assert whole_checkpoints(path.parent) == []
    assert latest(path.parent) is None


@pytest.fixture
def shards(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


def batches(folder: Path, verify: str) -> int:
    data = TokenDataModule(
        DataConfig(path=str(folder), verify=verify),
        micro_batch_size=2,
        accumulate=1,
        num_steps=4,
        eval_batch_size=2,
        eval_sequences=4,
    )
    return sum(1 for _ in data.train_dataloader())


@pytest.mark.parametrize("verify", ["none", "size", "sha256"])
def test_a_hostile_shard_runs_nothing(shards, tmp_path, verify):
    """Each array of the shard is an object array that holds the pickle, of the same length."""
    import numpy as np

    mark = tmp_path / "it ran"
    shard = next((shards / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        members = [(m.offset_data, m.size) for m in tar.getmembers() if m.name.endswith(".npy")]
    stream = io.BytesIO()
    np.save(stream, np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    for offset, size in members:
        planted = stream.getvalue()[:size]
        content[offset : offset + size] = planted.ljust(size, b"\0")
    shard.write_bytes(content)
    with pytest.raises(DataError):
        batches(shards, verify)
    assert not mark.exists()


def test_a_pickle_for_an_index_runs_nothing(shards, tmp_path):
    mark = tmp_path / "it ran"
    (shards / "index.json").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(DataError):
        ShardIndex.load(shards, "sha256")
    assert not mark.exists()
