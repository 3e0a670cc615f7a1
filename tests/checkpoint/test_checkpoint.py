import errno
import json
import os
import pathlib
import shutil
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties

from modtrain.checkpoint import layout
from modtrain.checkpoint.layout import checkpoint_path, verify
from modtrain.checkpoint.reading import translate_load_errors
from modtrain.checkpoint.recovery import latest, prune, recover, whole_checkpoints
from modtrain.common.errors import CheckpointError
from tests.helpers.saved import flip_bit, load_whole, save_whole

NAMES = st.text("abcdef", min_size=1, max_size=5)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)
TENSORS = st.builds(
    lambda shape, dtype: (torch.randn(shape) * 50).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


def save(root, step):
    path = checkpoint_path(root, step)
    save_whole(path, {"w": torch.arange(10.0) + step}, step)
    return path


@given(st.dictionaries(NAMES, TENSORS, max_size=4), st.dictionaries(NAMES, PLAIN, max_size=4))
@settings(max_examples=25, deadline=None)
def test_any_state_comes_back_bitwise(tmp_path_factory, tensors, rest):
    path = tmp_path_factory.mktemp("state") / "step-000000001"
    save_whole(path, tensors, 1, rest)
    loaded, loaded_rest = load_whole(path)
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype == tensor.dtype and torch.equal(loaded[key], tensor)
    # Types count as well.
    assert repr(loaded_rest) == repr(rest)


def test_what_a_later_torch_adds_to_the_metadata_is_not_read(tmp_path, monkeypatch):
    """torch 2.15 added strides to the properties of tensors, and 2.13 failed on them."""
    known = TensorProperties.__getstate__
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda self: (*known(self), (1,)))
    path = save(tmp_path, 1)
    monkeypatch.undo()
    assert torch.equal(load_whole(path)[0]["w"], torch.arange(10.0) + 1)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_checkpoint_of_another_python_is_read(tmp_path, monkeypatch, module):
    """The metadata name the class of a path: of another module in Python 3.13."""
    monkeypatch.setitem(sys.modules, module, pathlib)
    monkeypatch.setattr(pathlib.PosixPath, "__module__", module)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    assert module.encode() in (path / ".metadata").read_bytes()
    assert torch.equal(load_whole(path)[0]["w"], torch.arange(10.0) + 1)


def damage_truncate(path):
    file = max(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(path):
    flip_bit(max(path.glob("*.distcp")))


def damage_remove(path):
    (path / "state.pt").unlink()


def damage_manifest(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])


def damage_only_a_folder(path):
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip, damage_remove, damage_manifest, damage_only_a_folder]
)
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path, damage):
    old, new = save(tmp_path, 5), save(tmp_path, 10)
    assert latest(tmp_path) == (10, new)
    damage(new)
    with pytest.raises(CheckpointError):
        load_whole(new)
    assert latest(tmp_path) == (5, old)
    assert recover(tmp_path) == (5, old)
    assert save(tmp_path, 10) == new
    assert recover(tmp_path) == (10, new)


def test_latest_goes_by_the_content_not_by_the_name(tmp_path):
    path = save(tmp_path, 7)
    path.rename(tmp_path / "step-000000999")
    assert latest(tmp_path) == (7, tmp_path / "step-000000999")
    assert latest(tmp_path / "nothing") is None


def copy_as(path, name):
    return pathlib.Path(shutil.copytree(path, path.with_name(name)))


def test_a_copy_under_a_name_of_its_own_is_no_newer_checkpoint(tmp_path, caplog):
    """`step-best` stands behind all numbers in the order of names."""
    paths = {step: save(tmp_path, step) for step in (8, 12, 16)}
    best = copy_as(paths[8], "step-best")
    assert recover(tmp_path) == latest(tmp_path) == (16, paths[16])
    assert "step-best is a checkpoint of step 8" in caplog.text
    assert whole_checkpoints(tmp_path) == [*paths.items()]
    assert prune(tmp_path, 1, None) == [paths[8], paths[12]]
    # Of its step it is the only one now, and stays.
    assert best.is_dir()
    assert whole_checkpoints(tmp_path) == [(8, best), (16, paths[16])]
    shutil.rmtree(paths[16])
    assert recover(tmp_path) == (8, best)


def test_a_name_of_another_step_is_in_no_way(tmp_path, caplog):
    paths = {step: save(tmp_path, step) for step in (8, 12)}
    copy_as(paths[8], "step-000000016")
    paths[12].rename(tmp_path / "step-000000020")
    assert recover(tmp_path) == (12, paths[12])
    assert "was the checkpoint of step 12: renamed to step-000000012" in caplog.text
    assert (tmp_path / "duplicate-step-000000016").is_dir()
    assert [save(tmp_path, step).name for step in (16, 20)] == ["step-000000016", "step-000000020"]
    assert recover(tmp_path)[0] == 20


@pytest.mark.parametrize("function", [recover, latest, whole_checkpoints])
def test_what_cannot_be_listed_is_not_empty(tmp_path, function):
    root = tmp_path / "checkpoints"
    root.mkdir()
    save(root, 1)
    user = os.geteuid()
    root.chmod(0)
    if user == 0:
        # Root reads everything.
        os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be listed: Permission denied"):
            function(root)
    finally:
        os.seteuid(user)
        root.chmod(0o700)


def test_every_bit_of_a_manifest_counts(tmp_path):
    """A flipped one would resume with the samples of another step."""
    path = save(tmp_path, 4)
    manifest = path / "manifest.json"
    text = manifest.read_bytes()
    for place in range(len(text)):
        manifest.write_bytes(text[:place] + bytes([text[place] ^ 2]) + text[place + 1 :])
        if json_of(manifest) != json.loads(text):
            with pytest.raises(CheckpointError):
                verify(path)


def json_of(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def test_where_no_checkpoint_can_be_read_none_is_moved(tmp_path, monkeypatch):
    """A disk that is away for a while must not send the run back to its first step."""
    steps = (2, 4)
    for step in steps:
        save(tmp_path, step)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as away:
        away.setattr(layout, "file_sha256", stale)
        with pytest.raises(CheckpointError, match=r"none of the checkpoints(.|\n)*remedy"):
            recover(tmp_path)
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [*steps]
    assert recover(tmp_path) == (4, tmp_path / "step-000000004")


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Each file as long at its last fsync as it is in the end: a power cut loses nothing of it."""
    synced = {}
    fsync = os.fsync

    def spy(number):
        status = os.fstat(number)
        synced[status.st_ino] = status.st_size
        fsync(number)

    monkeypatch.setattr(os, "fsync", spy)
    path = save(tmp_path, 1)
    for file in path.iterdir():
        assert synced[file.stat().st_ino] == file.stat().st_size, file.name


@pytest.mark.parametrize("wrapped", [KeyboardInterrupt(), OSError("disk")])
def test_ctrl_c_while_a_checkpoint_is_read_is_no_damage(tmp_path, wrapped):
    is_interrupt = isinstance(wrapped, KeyboardInterrupt)
    expected = KeyboardInterrupt if is_interrupt else CheckpointError
    with pytest.raises(expected) as raised, translate_load_errors(tmp_path):
        raise CheckpointException("read", {0: (wrapped, None)})
    assert is_interrupt or "rank 0: disk" in str(raised.value)
