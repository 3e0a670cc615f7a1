"""Saves beside training, in one process: what they copy, wait for, keep and report."""

import os
import shutil
import subprocess
import threading

import pytest
import torch

from modtrain.checkpoint import writing
from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.layout import Manifest, checkpoint_path, verify
from modtrain.checkpoint.parts import Staging
from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.recovery import recover, whole_checkpoints
from modtrain.common.errors import CheckpointError
from modtrain.distributed.process_group import Ranks


@pytest.fixture
def gate(monkeypatch):
    """Saves wait before they write their tensors until it is opened."""
    opened, resolve = threading.Event(), writing._PartsPlanner.resolve_data

    def wait(*arguments):
        assert opened.wait(20)
        return resolve(*arguments)

    monkeypatch.setattr(writing._PartsPlanner, "resolve_data", wait)
    yield opened
    opened.set()


def put(checkpointer, root, step, value, **options):
    path = checkpoint_path(root, step)
    checkpointer.save(path, {"w": value}, {"step": step}, step, **options)
    return path


def test_a_save_has_the_state_of_the_moment_it_was_requested(tmp_path, gate):
    checkpointer, value = Checkpointer(Ranks.create()), torch.ones(4)
    path = put(checkpointer, tmp_path, 1, value)
    value.zero_()
    assert checkpointer.poll()
    assert not whole_checkpoints(tmp_path)
    gate.set()
    checkpointer.wait()
    assert not checkpointer.poll()
    assert TensorReader(path)["w"].tolist() == [1, 1, 1, 1]


def test_a_later_copy_is_waited_for(tmp_path, monkeypatch):
    opened, copy = threading.Event(), Staging.copy

    def wait(*arguments):
        assert opened.wait(20)
        return copy(*arguments)

    monkeypatch.setattr(Staging, "copy", wait)
    checkpointer, value = Checkpointer(Ranks.create()), torch.ones(4)
    path = put(checkpointer, tmp_path, 1, value, async_copy=True)
    threading.Timer(0.2, lambda: (value.mul_(3), opened.set())).start()
    checkpointer.wait_for_copy()
    value.zero_()
    checkpointer.close()
    assert TensorReader(path)["w"].tolist() == [3, 3, 3, 3]
    checkpointer.wait_for_copy()  # nothing to wait for


def test_a_second_save_waits_for_the_first_and_uses_its_memory(tmp_path):
    checkpointer, value = Checkpointer(Ranks.create()), torch.ones(4)
    first = put(checkpointer, tmp_path, 1, value)
    buffer = checkpointer._staging._buffers["w"]
    second = put(checkpointer, tmp_path, 2, value + 1)
    assert verify(first) == 1
    assert checkpointer._staging._buffers["w"] is buffer
    checkpointer.close()
    assert [TensorReader(path)["w"][0].item() for path in (first, second)] == [1, 2]


def test_a_blocking_save_is_on_disk_and_takes_no_copy(tmp_path):
    checkpointer = Checkpointer(Ranks.create())
    path = put(checkpointer, tmp_path, 1, torch.ones(4)[::2], blocking=True)
    assert verify(path) == 1
    assert checkpointer._staging._buffers == {}
    assert TensorReader(path)["w"].tolist() == [1, 1]


def test_old_ones_are_removed_when_the_new_one_is_complete(tmp_path, gate):
    gate.set()
    checkpointer = Checkpointer(Ranks.create(), keep_last=1, keep_every=2)
    for step in (1, 2, 3):
        put(checkpointer, tmp_path, step, torch.ones(1), blocking=True)
    gate.clear()
    put(checkpointer, tmp_path, 5, torch.ones(1))
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [2, 3]
    gate.set()
    checkpointer.wait()
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [2, 5]


def test_chosen_steps_stay(tmp_path):
    with Checkpointer(Ranks.create(), keep_last=1, keep_steps=(1, 4)) as checkpointer:
        for step in range(1, 7):
            put(checkpointer, tmp_path, step, torch.ones(1), blocking=True)
    assert [step for step, _ in whole_checkpoints(tmp_path)] == [1, 4, 6]


def test_a_failed_save_prunes_nothing_and_is_reported_once(tmp_path, monkeypatch):
    for step in (0, 1):
        put(Checkpointer(Ranks.create()), tmp_path, step, torch.ones(1), blocking=True)
    checkpointer = Checkpointer(Ranks.create(), keep_last=1)

    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    put(checkpointer, tmp_path, 2, torch.ones(1))
    with pytest.raises(CheckpointError, match=r"could not be written: .*Input/output"):
        put(checkpointer, tmp_path, 3, torch.ones(1))
    monkeypatch.undo()
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000000", "step-000000001"]
    put(checkpointer, tmp_path, 3, torch.ones(1), blocking=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


def test_a_path_is_never_written_twice(tmp_path):
    checkpointer = Checkpointer(Ranks.create())
    put(checkpointer, tmp_path, 1, torch.ones(1))
    with pytest.raises(CheckpointError, match="never written twice"):
        put(checkpointer, tmp_path, 1, torch.zeros(1))
    assert verify(checkpoint_path(tmp_path, 1)) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_fails_the_save_alone(small_disk):
    checkpointer = Checkpointer(Ranks.create(), keep_last=1)
    kept = put(checkpointer, small_disk, 1, torch.ones(1000), blocking=True)
    disk = os.statvfs(small_disk)
    left = disk.f_bavail * disk.f_frsize
    for count in (left, left // 4 - 2 * 1024):  # in the tensors; in what comes after them
        put(checkpointer, small_disk, 2, torch.ones(count))
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpointer.wait()
        assert [path.name for path in small_disk.iterdir()] == [kept.name]
        assert recover(small_disk) == (1, kept)
    put(checkpointer, small_disk, 2, torch.ones(1000), blocking=True)


def test_a_disk_that_became_read_only_fails_the_save_alone(small_disk):
    checkpointer = Checkpointer(Ranks.create())
    kept = put(checkpointer, small_disk, 1, torch.ones(10), blocking=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    put(checkpointer, small_disk, 2, torch.ones(10))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        checkpointer.close()
    assert recover(small_disk) == (1, kept)


def test_a_directory_that_vanished_is_reported_and_not_created_again(tmp_path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    checkpointer = Checkpointer(Ranks.create())
    put(checkpointer, root, 1, torch.ones(10), blocking=True)
    shutil.rmtree(root)
    put(checkpointer, root, 2, torch.ones(10))
    with pytest.raises(CheckpointError, match="No such file or directory"):
        checkpointer.wait()
    assert not root.exists()
    assert recover(root) is None


def test_a_directory_that_vanishes_midway_is_reported(tmp_path, monkeypatch):
    write = writing._HashingStream.write

    def vanish(self, content):
        shutil.rmtree(tmp_path / ".writing-step-000000001", ignore_errors=True)
        return write(self, content)

    monkeypatch.setattr(writing._HashingStream, "write", vanish)
    checkpointer = Checkpointer(Ranks.create())
    put(checkpointer, tmp_path, 1, torch.ones(10))
    with pytest.raises(CheckpointError, match=r"could not be written|not seen by rank 0"):
        checkpointer.wait()
    assert recover(tmp_path) is None


def test_an_error_in_training_does_not_wait_for_the_disk(tmp_path, gate):
    with pytest.raises(ZeroDivisionError), Checkpointer(Ranks.create()) as checkpointer:
        put(checkpointer, tmp_path, 1, torch.ones(1))
        raise ZeroDivisionError
    assert not whole_checkpoints(tmp_path)


def test_checksums_are_those_of_the_files(tmp_path):
    with Checkpointer(Ranks.create()) as checkpointer:
        path = put(checkpointer, tmp_path, 1, torch.randn(1000), rank_state={"n": 1})
    manifest = Manifest.read(path)
    assert manifest.files.keys() == {".metadata", "__0_0.distcp", "state.pt"}
    assert verify(path) == 1
    assert manifest.num_bytes == sum(
        file.stat().st_size for file in path.iterdir() if file.name != "manifest.json"
    )
