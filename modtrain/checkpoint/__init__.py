"""Checkpoints on disk: whole or not there at all, written and read by any number of ranks.

A checkpoint is a directory ``step-<n>``:

- ``.metadata`` and ``*.distcp``: every tensor, by torch.distributed.checkpoint
- ``state.pt``: everything else (numbers, strings, lists), loadable with ``weights_only=True``
- ``manifest.json``: step, and size and SHA-256 of each file; written last

It is written under another name, flushed to disk, and renamed; its path is never written again.
Files of others stay data: nothing is unpickled beyond a list of harmless classes.

Training on any number of ranks, one included::

    saver = Saver(ranks, keep_last=2, keep_every=None)         # collective
    found = recover(root, ranks)                               # (step, path) or None, on all alike
    if found:
        restored = restore(found[1], model, optimizer, ranks)  # in place, whatever the layout
        # restored.rest, restored.rank_state (None on another world size), restored.world_size
    ...
    tensors, named = named_state(model, optimizer)             # plain tensors or DTensors, by key
    saver.save(checkpoint_path(root, step), tensors, {**named, **rest}, step, rank_state)
    saver.poll()                                               # each step: tells of a failed save
    saver.copied()                                             # after save(…, later=True)
    saver.close()                                              # at the end, or ``with Saver(…)``

Every rank calls `Saver`'s methods, `recover` and `restore` alike; what fails on one rank is raised
on all. ``model`` may be wrapped (DistributedDataParallel, FSDP2, torch.compile); ``optimizer`` is a
torch AdamW over its parameters, fresh or not. Who keeps state otherwise, as DeepSpeed does, gives
whole tensors under the same keys, each on one rank, with ``save(…, dealt=False)``, and takes them
from a `TensorReader`, a mapping that reads a tensor when it is asked for.
"""
