"""Files are read as data, whatever they are: nothing waits, or is written through a link."""

import os

import pytest

from modtrain.common.atomic_io import acquire_lock, is_locked, open_to_append
from modtrain.common.errors import CheckpointError
from modtrain.common.reading import (
    UnreadableError,
    read_bytes,
    read_or_set_aside,
    read_records,
    read_text,
)


def has_step(record):
    return "step" in record


def test_damaged_lines_are_numbered_and_a_cut_last_one_is_not(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = [b'{"step": 1}', b"null", b'{"other": 1}', b"\xff", b"", b'{"step": 2}', b"[" * 100_000]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 3, "lo')
    assert read_records(path, has_step) == ([{"step": 1}, {"step": 2}], [2, 3, 4, 7])
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert read_records(path, has_step) == ([{"step": 1}, {"step": 2}], [])


def test_a_line_longer_than_allowed_is_damaged_and_the_next_one_is_read(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"step": "%s"}\n{"step": 2}\n' % (b"a" * 1000))
    assert read_records(path, has_step, max_line_bytes=64) == ([{"step": 2}], [1])
    path.write_bytes(b'{"step": 1}\n' + b"a" * 1000)
    assert read_records(path, has_step, max_line_bytes=64) == ([{"step": 1}], [2])


def make_pipe(path):
    os.mkfifo(path)


def make_folder(path):
    path.mkdir()


def make_endless(path):
    path.symlink_to("/dev/zero")


def make_large(path):
    with path.open("wb") as file:
        # It takes no room on the disk.
        file.truncate(2**40)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [make_pipe, make_folder, make_endless, make_large])
def test_what_would_block_or_fill_the_memory_is_set_aside(tmp_path, make, caplog):
    path = tmp_path / "file"
    make(path)
    with pytest.raises(UnreadableError, match=r"^file (is|cannot)"):
        read_bytes(path)
    assert read_or_set_aside(path, read_text) is None
    assert f"{tmp_path}/file" in caplog.text and "kept as damaged-file" in caplog.text
    assert os.path.lexists(tmp_path / "damaged-file")
    assert read_or_set_aside(path, read_text) is None
    make(path)
    assert read_or_set_aside(path, read_text) is None
    assert os.path.lexists(tmp_path / "damaged-file-again")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [make_pipe, make_folder, make_endless])
def test_nothing_is_written_or_locked_but_a_regular_file(tmp_path, make):
    path = tmp_path / "file"
    make(path)
    for use in (open_to_append, lambda path: acquire_lock(path).__enter__()):
        with pytest.raises(CheckpointError, match=r"is not a regular file(.|\n)*remedy"):
            use(path)
    assert not is_locked(path)


def test_a_lock_does_not_empty_what_it_links_to(tmp_path):
    target, lock = tmp_path / "target", tmp_path / ".lock"
    target.write_text("text")
    lock.symlink_to(target)
    with pytest.raises(CheckpointError, match="not a regular file"), acquire_lock(lock):
        pass
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_to_append(lock)
    assert target.read_text() == "text"


def test_a_lock_of_another_process_and_a_file_that_grows(tmp_path):
    path = tmp_path / "file"
    with acquire_lock(path):
        assert is_locked(path)
        with pytest.raises(BlockingIOError), acquire_lock(path):
            pass
    assert not is_locked(path)
    for text in (b"one", b"two"):
        with open_to_append(path) as file:
            file.write(text)
    assert path.read_bytes() == b"onetwo"
