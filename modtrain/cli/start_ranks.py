"""Starts the ranks of a command that asks for it, once its configuration is sound for so many."""

from __future__ import annotations

from modtrain.cli.compose import compose
from modtrain.cli.local_ranks import LocalRanks
from modtrain.common.errors import ConfigError, Problem
from modtrain.common.terminal import plain_console
from modtrain.data.prepare.worker_pool import usable_cpus
from modtrain.distributed.launch import Launch
from modtrain.distributed.local_launch import launch_local
from modtrain.training.hardware import num_devices, resolve_accelerator
from modtrain.training.plan import resolve
from modtrain.training.stop_signal import STOP


def start_ranks(verb: str, ranks: LocalRanks, config_dir: str | None) -> int:
    """Start the ranks of a verb, once its configuration is known to be sound for so many.

    Returns:
        The exit code, as of one process.

    Raises:
        ConfigError: everything that is wrong, before a process is started.
    """
    config = compose(verb, ranks.words, config_dir)
    device = resolve_accelerator(config.strategy.accelerator)
    count = _count(ranks.count, device, num_devices(device))
    words = list(ranks.words)
    has_strategy = any(word.startswith(("strategy=", "strategy.name=")) for word in words)
    if count > 1 and config.strategy.name == "single" and not has_strategy:
        words.append("strategy=ddp")
        note = f"{count} processes: strategy=ddp, for none was named"
        plain_console(stderr=True, soft_wrap=True).print(note)
        config = compose(verb, words, config_dir)
    if verb == "train":
        resolve(config, launch=Launch(count, 0, 0, count))

    if STOP.requested:
        return STOP.exit_code
    options = [] if config_dir is None else ["--config-dir", config_dir]
    command = ["-m", "modtrain", verb, *options, "--", *words]
    return launch_local(command, count, max(1, usable_cpus() // count))


def _count(asked: int | None, device: str, available: int) -> int:
    """Return how many processes to start: as many as there are GPUs, if it is not given."""
    if device != "cuda":
        if asked is not None:
            return asked
        reason, remedy = "is not given, and there are no GPUs to count", "add num_processes=2"
        raise ConfigError([Problem("num_processes", "null", reason, remedy)])
    if asked is not None and asked > available:
        reason = f"is more than the {available} GPUs here, and each process has its own"
        raise ConfigError([Problem("num_processes", asked, reason, f"give {available}")])
    return available if asked is None else asked
