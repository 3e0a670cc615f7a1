"""Faults at places that cannot be hit from outside. Python imports this first, off PYTHONPATH.

`MODTRAIN_TEST_FAULTS` names a JSON file, a list of faults: ``at`` a place (``start``, ``imports``,
``step``, ``save``, ``evaluation``) from ``step`` on, on ``rank`` (null: on all), ``do``: ``raise``,
``kill``, ``pause`` or ``slow``. Each happens once a rank, at whatever start, unless ``always``.
Beside the file lies a mark of each, ``<name>-<rank>``, of an array's task ``<name>-<rank>.<task>``,
which holds the node's name and the process's id. A paused process resumes when there is
``<name>.go``, and when it is asked to stop, unless it is ``deaf``.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

PATH = Path(os.environ.get("MODTRAIN_TEST_FAULTS", "/nothing"))
RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "-1")))
TASK = f".{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
# torchrun's agent is no rank, and neither is what submits.
IS_RANK = "SLURM_STEP_ID" in os.environ and (
    "RANK" in os.environ or "torch.distributed.run" not in sys.orig_argv
)
PATIENCE = 180.0


def faults_at(place: str, step: int | None):
    for fault in json.loads(PATH.read_text()):
        right_step = step is None or fault["step"] <= step
        if fault["at"] == place and fault["rank"] in (None, RANK) and right_step:
            yield fault


def happens(place: str, step: int | None = None) -> None:
    for fault in faults_at(place, step):
        mark = PATH.with_name(f"{fault['name']}-{RANK}{TASK}")
        if mark.exists() and not fault.get("always"):
            continue
        aside = mark.with_name(f"{mark.name}.new")
        aside.write_text(f"{os.uname().nodename} {os.getpid()}")
        aside.rename(mark)
        if fault["do"] == "raise":
            raise ValueError(f"the disk spoke Latin {time.time()}")
        if fault["do"] == "kill":
            os.kill(os.getpid(), 9)
        if fault["do"] == "slow":
            time.sleep(fault["seconds"])
        else:
            pause(fault["name"], fault.get("deaf", False))


def pause(name: str, is_deaf: bool) -> None:
    released, until = PATH.with_name(f"{name}.go"), time.monotonic() + PATIENCE
    while time.monotonic() < until and not released.exists():
        preemption = sys.modules.get("modtrain.training.stop_signal")
        if not is_deaf and preemption is not None and preemption.STOP.requested:
            return
        time.sleep(0.01)


def in_module(module) -> None:
    original = module.LanguageModule.training_step

    def training_step(self, batch, batch_idx):
        happens("step", self.global_step)
        return original(self, batch, batch_idx)

    module.LanguageModule.training_step = training_step


def in_writing(module) -> None:
    original = module._write_parts

    def write_parts(aside, *arguments):
        files = original(aside, *arguments)
        happens("save", int(aside.name.rpartition("-")[2]))
        return files

    module._write_parts = write_parts


def in_evaluation(module) -> None:
    original = module.evaluate

    def evaluate(*arguments, **named):
        happens("evaluation")
        return original(*arguments, **named)

    module.evaluate = evaluate


PLACES = {
    "modtrain.training.module": in_module,
    "modtrain.checkpoint.writing": in_writing,
    "modtrain.training.callbacks.evaluation": in_evaluation,
    "modtrain.training.callbacks.metrics": lambda module: happens("imports"),
}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in PLACES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            PLACES[name](module)

        spec.loader.exec_module = exec_module
        return spec


if IS_RANK and PATH.is_file():
    sys.meta_path.insert(0, Finder())
    happens("start")
