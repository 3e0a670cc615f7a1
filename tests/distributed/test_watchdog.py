"""What a watchdog knows of other ranks once the store is gone with rank 0."""

import json
import time

import torch.distributed as dist

from modtrain.distributed.process_group import host_and_pid
from modtrain.distributed.watchdog import Watchdog


class Store:
    """A store that ends with its process."""

    def __init__(self):
        self.store, self.is_alive = dist.HashStore(), True

    def __getattr__(self, name):
        if not self.is_alive:
            raise dist.DistNetworkError("Connection reset by peer")
        return getattr(self.store, name)


def test_a_lower_rank_that_starts_later_is_known_within_the_same_interval(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    store = Store()
    # An interval of 5 s.
    watchdog = Watchdog(store, 2, 3, timeout=60.0, logs=None)
    try:
        time.sleep(0.3)
        for rank, process in (0, "elsewhere, process 1"), (1, host_and_pid()):
            store.set(f"heartbeat/{rank}", json.dumps([process, "start", 0.0, 1]))
        time.sleep(1)
        store.is_alive = False
        cause = watchdog.find_cause(dist.DistError("Connection closed by peer"))
    finally:
        watchdog.close()
    assert "rank 0 on elsewhere, process 1 has died" in str(cause)
    # Rank 1 lives on this host, and reports it.
    assert not cause.is_reported_here
