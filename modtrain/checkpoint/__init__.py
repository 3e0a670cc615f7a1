"""Checkpoints on disk: whole or absent, written and read by any number of ranks.

A checkpoint is a directory ``step-<n>``:

- ``.metadata`` and ``*.distcp``: every tensor, by torch.distributed.checkpoint
- ``state.pt``: everything else (numbers, strings, lists), loadable with ``weights_only=True``
- ``manifest.json``: step, and size and SHA-256 of each file; written last

It is written under another name, flushed to disk, and renamed; its path is never written again.
Checkpoints from elsewhere are only data: nothing but a list of harmless classes is unpickled.

Training on any number of ranks, including one::

    newest = recover(root, ranks)                              # (step, path) or None
    if newest:
        restored = restore(newest[1], model, optimizer, ranks)  # in place, any layout
        # restored.extra_state, .rank_state (None for another world size), .world_size
    checkpointer = Checkpointer(ranks, keep_last=2, keep_every=None)
    ...
    tensors, named = named_state(model, optimizer)             # plain tensors or DTensors, by key
    path = checkpoint_path(root, step)
    checkpointer.save(path, tensors, {**named, **more}, step, rank_state)
    checkpointer.poll()                                        # each step: raises a failed save
    checkpointer.wait_for_copy()                               # after save(…, async_copy=True)
    checkpointer.close()                                       # at the end

Every rank calls these functions and methods alike; what fails on one rank is raised on all.
``model`` may be wrapped (DistributedDataParallel, FSDP2, torch.compile); ``optimizer`` is one of
`modtrain.optimizers` over its parameters, new or used. State of another form, such as DeepSpeed's,
is passed as whole tensors under the same keys, each on one rank, with
``save(…, deduplicate=False)``, and restored with ``load(path, fill)`` from a `TensorReader`, a
mapping that reads a tensor on access.
"""
