"""A training run: from its newest checkpoint, or its start, to its end."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Literal

import lightning as L
import torch

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.recovery import recover, whole_checkpoints
from modtrain.common.errors import ModtrainError
from modtrain.common.spelling import spelled
from modtrain.common.terminal import last_output, plain_console, print_line
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.distributed.launch import Launch
from modtrain.distributed.process_group import Ranks, init_ranks
from modtrain.distributed.watchdog import SLOW_TIMEOUT, Watchdog, run_watchdog
from modtrain.models.transformer import zero_scores
from modtrain.parallel import lightning_overrides as overrides
from modtrain.parallel.strategies.base import TrainingStrategy, make_strategy
from modtrain.training.callbacks.checkpoints import CheckpointCallback
from modtrain.training.callbacks.evaluation import HeldOutCallback
from modtrain.training.callbacks.guard import FiniteLossGuard
from modtrain.training.callbacks.heartbeat import HeartbeatCallback
from modtrain.training.callbacks.initial_weights import InitialWeightsCallback
from modtrain.training.callbacks.metrics import MetricsCallback, StepClock
from modtrain.training.callbacks.progress import ProgressCallback
from modtrain.training.callbacks.spike_guard import SpikeGuard
from modtrain.training.callbacks.step_times import StepTimesCallback
from modtrain.training.callbacks.usage import UsageCallback, start_usage
from modtrain.training.config import TrainConfig
from modtrain.training.hardware import resolve_accelerator, resolve_precision
from modtrain.training.lost_records import settle_records
from modtrain.training.metrics_log import MetricsLog, last_recorded_step
from modtrain.training.mixture_change import settle_mixture
from modtrain.training.module import LanguageModule
from modtrain.training.plan import TrainingPlan, resolve, strategy_options
from modtrain.training.rank_consistency import check_rank_consistency
from modtrain.training.result import finite_result
from modtrain.training.run_directory import RunDirectory
from modtrain.training.run_names import claim_name
from modtrain.training.spikes.journal import RollBackError, SpikeJournal
from modtrain.training.start_check.check import check_all_reduce, check_nodes
from modtrain.training.starting_point.find import (
    StartingPoint,
    find_starting_point,
    inherit_prompt_format,
    recorded_parent,
)
from modtrain.training.stop_signal import STOP
from modtrain.training.usage import UsageRecord

_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
}


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. status: ``complete``, ``already complete`` or ``stopped``."""

    status: str
    run: RunDirectory
    exit_code: int = 0


def train(
    config: TrainConfig, callbacks: Sequence[L.Callback] = (), plan: TrainingPlan | None = None
) -> TrainResult:
    """Train the run that ``config`` describes, from its newest whole checkpoint if it has one.

    Collective where torchrun or srun started several processes.

    callbacks: further Lightning callbacks; they are called first. plan: of ``config``, if both are
    what `resolve` returned for these processes; None: they are resolved here.

    Raises:
        ModtrainError: an error that the user can correct, with the remedy.
    """
    launch = Launch.from_environment()
    launch.export()
    # Resolved once: on another device ``auto`` could mean another precision after a resume.
    accelerator = resolve_accelerator(config.strategy.accelerator)
    config = replace(config, precision=resolve_precision(config.precision, accelerator))
    has_made_name = config.name is None
    timeout = timedelta(seconds=config.strategy.timeout)
    needs_group = config.strategy.name != "single"
    is_checked = config.start_check.enabled
    check = partial(check_nodes, config, launch, accelerator) if is_checked else None
    with (
        STOP.time_limit(config.max_seconds),
        init_ranks(launch, accelerator, timeout, needs_group, check) as ranks,
        _named(config, ranks, launch) as named,
        run_watchdog(ranks, config.strategy.timeout, RunDirectory.of(named).logs) as watchdog,
    ):
        resolved = named
        if plan is None:
            with ranks.raise_on_all_ranks():
                resolved, plan = resolve(named, launch=launch)
        run = _Run(resolved, plan, launch, accelerator, ranks, watchdog, callbacks, has_made_name)
        return run.train()


@contextmanager
def _named(config: TrainConfig, ranks: Ranks, launch: Launch) -> Iterator[TrainConfig]:
    """Give a run without a name one, and say so again where it ends by an error; collective."""
    if config.name is not None:
        yield config
        return
    name = ranks.run_on_rank0(lambda: claim_name(resolve(config, launch=launch)[0]))
    path = RunDirectory.of(replace(config, name=name)).path
    if ranks.is_rank0:
        print_line(f"{path} is a new run; to resume it, add {spelled('name', name)}")
    try:
        yield replace(config, name=name)
    except ModtrainError as error:
        error.add_note(f"the run is {path}: add {spelled('name', name)} to the command")
        raise


@dataclass
class _Run:
    """A run on this rank. Every method is collective."""

    config: TrainConfig
    plan: TrainingPlan
    launch: Launch
    accelerator: str
    ranks: Ranks
    watchdog: Watchdog | None
    more_callbacks: Sequence[L.Callback]
    has_made_name: bool = False

    def __post_init__(self) -> None:
        config, plan = self.config, self.plan
        self.directory = RunDirectory.of(config)
        self._beginning: StartingPoint | None = None
        self.usage = UsageRecord(self.directory.path, self.ranks.is_rank0)
        self.console = plain_console(soft_wrap=True, quiet=not self.ranks.is_rank0)
        self.data = TokenDataModule(
            config.data,
            micro_batch_size=config.batch.micro_batch_size,
            accumulate=plan.accumulate,
            num_steps=plan.steps,
            eval_batch_size=config.eval.batch_size,
            eval_sequences=config.eval.sequences,
        )

    def train(self) -> TrainResult:
        """Train the steps that are left."""
        run, ranks = self.directory, self.ranks
        if ranks.broadcast_from_rank0(run.is_complete):
            with ranks.raise_on_all_ranks():
                run.check_same(self.config)
            with last_output():
                self.console.print(f"{run.path} is complete: nothing to train")
            return TrainResult("already complete", run)
        with ExitStack() as lock:
            ranks.run_on_rank0(lambda: lock.enter_context(run.locked()))
            try:
                result = self._train_locked()
            except BaseException as error:
                self.usage.end(f"{type(error).__name__}: {error}")
                raise
            is_stopped = result.status == "stopped"
            self.usage.end(f"stopped by {STOP.name}" if is_stopped else result.status)
            return result

    def _train_locked(self) -> TrainResult:
        config, plan, run, ranks = self.config, self.plan, self.directory, self.ranks
        if config.strategy.num_threads is not None:
            torch.set_num_threads(config.strategy.num_threads)
        self._start()
        journal, last_step = SpikeJournal(run, ranks, plan.steps * plan.sequences_per_step), None
        while last_step is None:
            # The fit before may have left its model in a reference cycle.
            gc.collect()
            saving = config.checkpoint
            with Checkpointer(
                ranks,
                saving.keep_last,
                saving.keep_every,
                keep_steps=saving.keep_steps,
                on_saved=run.record_save,
            ) as checkpointer:
                last_step = self._resume(checkpointer, journal)
        if last_step < plan.steps:
            return self._stopped()
        ranks.run_on_rank0(lambda: run.complete(finite_result(plan, run)))
        with last_output():
            text = f"{plan.steps} steps, {plan.flops:.3g} FLOPs"
            self.console.print(f"{run.path} is complete: {text}")
        return TrainResult("complete", run)

    def _start(self) -> None:
        """Record the start of the run, once all ranks agree on what they run."""
        with self.ranks.raise_on_all_ranks():
            fingerprint = self.data.summary.fingerprint
        check_rank_consistency(self.config, fingerprint, self.ranks)
        message = self.ranks.run_on_rank0(partial(settle_records, self.directory, self.config))
        if message:
            self.console.print(message)
        message = self.ranks.run_on_rank0(partial(settle_mixture, self.directory, self.config))
        if message:
            self.console.print(message)
        parent = None
        if self.ranks.broadcast_from_rank0(not self.directory.config.is_file()):
            # Before anything is recorded: a branch without its trunk is not a run.
            beginning = self._starting_point()
            parent = beginning.record
            self.ranks.run_on_rank0(
                partial(inherit_prompt_format, beginning.parent, self.directory, self.config)
            )
        start = partial(self.directory.start, self.config, fingerprint, self.accelerator, parent)
        self.ranks.run_on_rank0(start)
        if self.ranks.is_rank0:
            entry = start_usage(self.launch, self.accelerator, self.config.precision)
            self.usage.begin(last_recorded_step(self.directory.metrics), entry)
        if self.config.start_check.all_reduce and self.ranks.world_size > 1:
            cuda = self.accelerator == "cuda"
            device = torch.device("cuda", self.launch.local_rank) if cuda else torch.device("cpu")
            size = self.config.start_check.all_reduce
            self.console.print(f"start check: {check_all_reduce(size, device, self.ranks)}")
        with self.ranks.raise_on_all_ranks():
            self.directory.check_visible()
            self.data.check_shared_memory(self.launch.local_world_size)

    def _resume(self, checkpointer: Checkpointer, journal: SpikeJournal) -> int | None:
        """Train from the newest whole checkpoint; return the last step, None to roll back."""
        config, plan, run, ranks = self.config, self.plan, self.directory, self.ranks
        if self.watchdog is not None:
            self.watchdog.heartbeat("the choice of a checkpoint", SLOW_TIMEOUT)
        own = recover(run.checkpoints, ranks)
        beginning = StartingPoint(*own) if own else self._starting_point()
        start_step = beginning.step
        message = journal.resume(start_step, plan.sequences_per_step, config.spike)
        self.data.skipped_samples = journal.skipped_samples
        if message:
            self.console.print(message)
        if start_step:
            how = "resumes" if own else f"branches off {config.branch.run}"
            self.console.print(f"{run.path} {how} from step {start_step} of {plan.steps}")
        for note in beginning.notes:
            self.console.print(note)
        with ranks.raise_on_all_ranks():
            log = MetricsLog(run, config, plan, start_step, ranks.is_rank0)
        self.usage.resume(start_step, plan.flops_until(start_step))
        try:
            if message:
                log.write(start_step, {"spike/rollbacks": journal.rollbacks})
            if start_step == plan.steps:
                return start_step
            return self._fit(log, beginning, checkpointer, journal)
        except RollBackError as error:
            journal.pending = (error.spike, error.samples)
            return None
        finally:
            log.close()

    def _starting_point(self) -> StartingPoint:
        """Return where a run without a checkpoint of its own begins; collective."""
        fingerprint = self.data.summary.fingerprint
        find = partial(find_starting_point, self.config, self.plan, fingerprint)
        if self._beginning is None:
            self._beginning = self.ranks.run_on_rank0(find)
        return self._beginning

    def _fit(
        self,
        log: MetricsLog,
        beginning: StartingPoint,
        checkpointer: Checkpointer,
        journal: SpikeJournal,
    ) -> int:
        """Train from ``beginning``; return the last step made."""
        config, plan = self.config, self.plan
        strategy = make_strategy(strategy_options(config, plan), self.accelerator, checkpointer)
        # Data-parallel ranks have different sequences, and draw different numbers for them.
        L.seed_everything((config.seed + strategy.data_rank) % 2**32, verbose=False)
        parent = self.ranks.run_on_rank0(partial(recorded_parent, self.directory))
        module = LanguageModule(config, plan, parent)
        self.data.start_step = beginning.step
        callbacks = self._callbacks(log, checkpointer, journal)
        path = beginning.path
        if beginning.tensors is not None and path is not None:
            taken = beginning.tensors.taken
            callbacks.append(InitialWeightsCallback(path, taken, config.init.optimizer))
            path = None
            if config.init.keep_function:
                zero_scores(module.model)
        trainer = make_trainer(config, plan, strategy, self.launch, callbacks)
        trainer.fit(module, datamodule=self.data, ckpt_path=path)
        return trainer.global_step

    def _callbacks(
        self, log: MetricsLog, checkpointer: Checkpointer, journal: SpikeJournal
    ) -> list[L.Callback]:
        config, run, ranks = self.config, self.directory, self.ranks
        clock = StepClock()
        metrics = MetricsCallback(log, clock, config.log.every, config.precision, ranks)
        every = config.log.every
        intervals = [every, config.checkpoint.every, config.eval.every or every]
        guarded = (run, self.data, intervals, checkpointer, ranks)
        # The order matters: nothing is recorded, evaluated or saved after a bad step.
        callbacks: list[L.Callback] = [
            FiniteLossGuard(*guarded)
            if config.spike.action == "none"
            else SpikeGuard(*guarded, journal, log, self.console.print),
            metrics,
            UsageCallback(self.usage, metrics),
            HeldOutCallback(log, clock, config.eval.every, self.data, ranks, self.watchdog),
        ]
        if config.log.progress and ranks.is_rank0:
            callbacks.append(ProgressCallback(metrics, str(config.name)))
        callbacks.append(CheckpointCallback(run, config.checkpoint, clock, checkpointer, ranks))
        if self.watchdog is not None:
            callbacks.append(HeartbeatCallback(self.watchdog))
        if ranks.world_size > 1:
            # Last: what the others do after a batch is no wait for the next one.
            report = self.console.print
            callbacks.append(StepTimesCallback(run, log, config.log.every, ranks, report))
        return [*self.more_callbacks, *callbacks]

    def _stopped(self) -> TrainResult:
        run = self.directory
        newest = whole_checkpoints(run.checkpoints)[-1:]
        requests = self.ranks.all_gather_object((STOP.signum, STOP.is_out_of_time))
        if STOP.signum is None:
            # Another rank received it.
            STOP.signum = next((signum for signum, _ in requests if signum is not None), None)
        if any(is_out_of_time for _, is_out_of_time in requests):
            STOP.expire()
        saved = f"step {newest[0][0]} is saved" if newest else "nothing is saved yet"
        how = "rerun the same command"
        if self.has_made_name:
            how = f"add {spelled('name', str(self.config.name))} to the command"
        with last_output():
            self.console.print(f"stopped by {STOP.name}: {saved}; {how} to resume")
        return TrainResult("stopped", run, STOP.exit_code)


def make_trainer(
    config: TrainConfig,
    plan: TrainingPlan,
    strategy: TrainingStrategy,
    launch: Launch,
    callbacks: list[L.Callback],
) -> L.Trainer:
    """Build the trainer of a run whose precision is resolved."""
    overrides.silence_messages()
    trainer = L.Trainer(
        accelerator=resolve_accelerator(config.strategy.accelerator),
        strategy=strategy,
        devices=launch.local_world_size,
        num_nodes=launch.num_nodes,
        precision=_LIGHTNING_PRECISION[config.precision],
        max_steps=plan.steps,
        accumulate_grad_batches=plan.accumulate,
        callbacks=callbacks,
        plugins=[overrides.cluster_environment(launch)],
        deterministic=config.deterministic,
        **overrides.SWITCHED_OFF,
    )
    overrides.disable_signal_handlers(trainer)
    return trainer
