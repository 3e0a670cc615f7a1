"""Workers that read ahead, and a shared memory that is full."""

import multiprocessing
import shutil
import time
from types import SimpleNamespace

import pytest

from modtrain.common.errors import DataError
from modtrain.common.shared_memory import SHARED_MEMORY
from modtrain.data.config import DataConfig
from modtrain.data.stream import datamodule, loader
from modtrain.data.stream.batch import Batch
from modtrain.data.stream.datamodule import TokenDataModule

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="Linux's shared memory")


@pytest.fixture
def data(prepared):
    config = DataConfig(path=str(prepared), num_workers=2)
    sizes = {"micro_batch_size": 3, "accumulate": 2, "eval_batch_size": 4}
    return TokenDataModule(config, num_steps=6, **sizes)


@pytest.fixture
def forked_workers():
    """Workers see what a test replaces; Python 3.14 does not fork them by default."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_batches_that_do_not_fit_are_refused_at_the_start(data, monkeypatch):
    data.check_shared_memory(1)
    # Of two workers, batches of 3 and of 4 sequences and their documents.
    needed = 2 * data.config.prefetch_factor * 7 * (data.train_data.seq_len + 1) * 2 * 8
    free = loader.SPARE_BYTES + 8 * needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    data.check_shared_memory(8)
    with pytest.raises(DataError, match=r"/dev/shm has .* 2 workers of each of 9 processes"):
        data.check_shared_memory(9)
    data.config.num_workers = 0
    data.check_shared_memory(8)


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_reports_that_it_is_full(data, monkeypatch):
    monkeypatch.setattr(loader, "SPARE_BYTES", 2**60)
    with pytest.raises(DataError) as caught:
        next(iter(data.train_dataloader()))
    text = str(caught.value)
    assert text.startswith(f"{SHARED_MEMORY} has ") and "data.num_workers=0" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_a_batch_that_never_comes_ends_the_run(data, monkeypatch):
    """torch loses a batch for which there is no memory, and says nothing."""
    monkeypatch.setattr(datamodule, "_WORKER_TIMEOUT", 0.5)
    monkeypatch.setattr(Batch, "from_tokens", lambda *_, **__: time.sleep(1.5))
    with pytest.raises(DataError, match=r"gave no batch for 0 s; /dev/shm has [\d,]+ bytes free"):
        next(iter(data.train_dataloader()))
