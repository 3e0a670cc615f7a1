"""DeepSpeed's ZeRO, stages 1 to 3, as a Lightning strategy, on CUDA over nccl and on CPU over gloo.

Stage 1 shares out the optimizer's state over the ranks, 2 the gradients too, 3 the parameters too.
It differs from Lightning's own strategy in what modtrain asks of every strategy: it runs on the
CPU, the engine never casts parameters (bf16 is autocast), Lightning counts the micro-batches, trunk
and predictors are clipped separately, and state goes in and out by the parameters' names, so that a
checkpoint is the same as any other strategy's and needs no conversion for another number of ranks.
DeepSpeed is imported when a strategy is made.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from modtrain.checkpoint.reading import RenamedTensors, TensorReader
from modtrain.checkpoint.state import (
    RestoredState,
    load,
    optimizer_groups,
    source_keys,
    tied_names,
)
from modtrain.common.errors import ConfigError, Problem, TrainingError
from modtrain.parallel.config import StrategyConfig, StrategyOptions
from modtrain.parallel.strategies import deepspeed_state as state
from modtrain.parallel.strategies.ddp import DataParallelStrategy

# Elements of a bucket of gradients: 200 MB in fp32. A small model has smaller ones.
_BUCKET = 50_000_000


class DeepSpeedStrategy(DataParallelStrategy):
    """Trains under ZeRO, by an engine that is made when there is an optimizer."""

    deduplicate = False

    def __init__(self, options: StrategyOptions, device_type: str) -> None:
        """Raise ConfigError if DeepSpeed is not installed, or cannot use the device."""
        super().__init__(options, device_type)
        self.deepspeed = import_deepspeed(device_type)
        self.engine: Any = None
        # The gradient of the last step was not finite, and DeepSpeed left out the step.
        self.overflowed = False
        self._boundary = True
        self._groups: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer) -> None:
        """Put the module and its optimizer into an engine."""
        if trainer.state.fn != TrainerFn.FITTING or self.accelerator is None:
            return super().setup(trainer)
        self.accelerator.setup(trainer)
        module = self._module
        self.setup_optimizers(trainer)
        self._groups = optimizer_groups(self._transformer, self.optimizers[0])
        self.engine = self._engine(module, self.optimizers[0])
        self.model = self.engine
        # Its zero_grad knows the buffers that have to stay.
        self.optimizers = [self.engine.optimizer]
        return self.barrier()

    def _engine(self, module: L.LightningModule, optimizer: torch.optim.Optimizer) -> Any:
        stage = self.options.config.stage
        num_parameters = sum(parameter.numel() for parameter in module.parameters())
        is_cuda = self.root_device.type == "cuda"
        config = zero_config(self.options.config, num_parameters, is_cuda)
        if stage == 3:
            # One parameter after the other: the whole model need not fit on a device.
            self.deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.root_device)
        engine, *_ = self.deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),
            config=config,
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=optimizer,
            dist_init_required=False,
        )
        if stage == 3:
            # The loss multiplies by the head's weight in chunks, while the head does not run.
            model = self._transformer
            self.deepspeed.zero.register_external_parameter(model, model.head.weight)
        return engine

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's step inside the engine, under autocast where that is asked for."""
        module = self._module
        step = module.training_step

        def forward(*inner: Any, **named: Any) -> Any:
            # On CUDA the engine turns off an autocast that it is called under.
            with self.precision_plugin.train_step_context():
                return step(*inner, **named)

        module.forward = forward  # type: ignore[method-assign]
        try:
            return self.engine(*args, **kwargs)
        finally:
            del module.forward

    def backward(self, closure_loss: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Let the engine do it, which averages over the ranks."""
        module = self._module
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.engine.set_gradient_accumulation_boundary(self._boundary)
        self.engine.backward(loss)
        return self.precision_plugin.post_backward(loss, module)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Only accumulate: Lightning's loop stands around every micro-batch but a step's last."""
        self._boundary = False
        try:
            yield
            self.engine.step()
        finally:
            self._boundary = True

    def optimizer_step(
        self,
        optimizer: Any,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a step, and note in ``overflowed`` whether DeepSpeed left it out.

        A run's guard (`modtrain.training.callbacks.guard`) looks there and ends it with all that is
        known of the step.

        Raises:
            TrainingError: the step before was skipped, and no guard has noticed.
        """
        self._check_overflow()
        step: Any = _Step(self.engine, optimizer)
        result = super().optimizer_step(step, closure, model, **kwargs)
        self.overflowed = bool(getattr(optimizer, "overflow", False))
        return result

    def _check_overflow(self) -> None:
        if self.overflowed:
            raise TrainingError(
                f"the gradient of step {self._module.trainer.global_step} has a value that is not"
                " finite, and no step was made"
            )

    def clip_gradients(
        self, groups: Sequence[Sequence[nn.Parameter]], limit: float | None
    ) -> list[Tensor]:
        """Clip each group by its own norm; return the norms before."""
        return state.clip_gradients(self.engine, groups, limit)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Save as every strategy does.

        Raises:
            TrainingError: the last step was skipped, and no guard has noticed.
        """
        self._check_overflow()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def named_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors that this rank saves, and the metadata of all."""
        named = state.tensors(self.engine, self._transformer)
        groups = [
            {**group, "params": known["params"], "stateless": []}
            for group, known in zip(self.engine.optimizer.param_groups, self._groups, strict=True)
        ]
        return named, {"tied": tied_names(self._transformer), "optimizer_groups": groups}

    def restore(self, path: Path) -> RestoredState:
        """Put the state of the checkpoint ``path`` into the engine; return what else was saved."""

        def fill(reader: TensorReader, _extra_state: Any) -> None:
            state.put(self.engine, self._transformer, reader)

        restored = load(path, fill, self.checkpointer.ranks)
        state.publish(self.engine)
        state.take_groups(self.engine, self._groups, restored.extra_state)
        return restored

    def take(self, path: Path, sources: Mapping[str, str], with_optimizer: bool) -> None:
        """Put tensors of another model's checkpoint into the engine."""
        with self.checkpointer.ranks.raise_on_all_ranks():
            reader = TensorReader(path)
            keys = source_keys(reader, sources, with_optimizer)
            renamed = RenamedTensors(reader, keys)
            state.put(self.engine, self._transformer, renamed, is_partial=True)
        state.publish(self.engine)

    @property
    def _module(self) -> L.LightningModule:
        if self.lightning_module is None:
            raise RuntimeError("there is no module to train")
        return self.lightning_module

    def teardown(self) -> None:
        """Let go of the engine and its hooks."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine, self.model = None, self.lightning_module
        super().teardown()


class _Step:
    """What Lightning takes for the optimizer whose step runs the closure."""

    def __init__(self, engine: Any, optimizer: Any) -> None:
        self.engine, self.optimizer = engine, optimizer

    def step(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self.engine.step()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def import_deepspeed(device_type: str) -> ModuleType:
    """Import DeepSpeed for devices of this type, quietly, with nothing compiled at run time.

    Raises:
        ConfigError: it is not installed, or works on other devices in this process.
    """

    def refuse(reason: str, remedy: str) -> ConfigError:
        return ConfigError([Problem("strategy", "deepspeed", reason, remedy)])

    if device_type not in ("cpu", "cuda"):
        raise refuse(f"does not run on {device_type}", "use ddp, or accelerator=cpu")
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        deepspeed = importlib.import_module("deepspeed")
        ops = importlib.import_module("deepspeed.ops")
    except ImportError as error:
        raise refuse(str(error), "pip install deepspeed (on Linux), or use fsdp") from error
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # It calls torch's collectives by names that torch 2.13 has newer ones for.
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated", append=True)
    there = deepspeed.accelerator.get_accelerator().device_name()
    if there != device_type:
        remedy = f"set DS_ACCELERATOR={device_type}, or use accelerator={there}"
        raise refuse(f"was set up for {there} and not {device_type}", remedy)
    if device_type == "cpu":
        # Compiled for minutes at the first collective otherwise, where a compiler is found.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero_config(config: StrategyConfig, num_parameters: int, is_cuda: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Accumulation and clipping are not its business here."""
    bucket = max(1024, min(_BUCKET, num_parameters))
    zero: dict[str, Any] = {
        "stage": config.stage,
        "overlap_comm": is_cuda,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
    }
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": is_cuda}
        if config.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": is_cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        # torch's AdamW, on the host too: DeepSpeed's own would be compiled at run time.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
