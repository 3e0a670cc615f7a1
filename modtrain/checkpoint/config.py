"""Typed configuration of ``modtrain checkpoints``."""

from __future__ import annotations

from dataclasses import dataclass

from modtrain.common.errors import Problem
from modtrain.common.validation import at_least, not_empty, one_of

ACTIONS = ("list", "verify", "prune", "consolidate")
DTYPES = ("fp32", "bf16")


@dataclass
class CheckpointsConfig:
    """What to do with the checkpoints of a run.

    run: the run's name below ``runs_dir``.
    runs_dir: where runs live.
    action: ``list`` them; ``verify`` every byte; ``prune`` all but those to keep; ``consolidate``
        the weights of one to a safetensors file.
    step: the checkpoint to consolidate; null takes the newest.
    keep_last, keep_every: for pruning, as ``checkpoint.keep_last`` and ``checkpoint.keep_every``;
        null takes the run's own.
    output: the file to write; null is ``model-<step>.safetensors`` in the run's directory.
    dtype: of the weights in the file; training keeps them in fp32.
    """

    run: str | None = None
    runs_dir: str = "runs"
    action: str = "list"
    step: int | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    output: str | None = None
    dtype: str = "fp32"

    def problems(self, prefix: str = "") -> list[Problem]:
        """Everything wrong with the request."""
        uses = {"keep_last": "prune", "keep_every": "prune"}
        uses |= {"step": "consolidate", "output": "consolidate"}
        reason = f"has no meaning for action={self.action}"
        return [
            *not_empty(self, prefix, "run", "add run=my_run"),
            *one_of(self, prefix, "action", ACTIONS),
            *one_of(self, prefix, "dtype", DTYPES),
            *at_least(self, prefix, 1, "keep_last", "keep_every"),
            *(
                Problem(name, getattr(self, name), reason, f"leave it out, or action={action}")
                for name, action in uses.items()
                if getattr(self, name) is not None and self.action in {*ACTIONS} - {action}
            ),
        ]
