"""The command line: verbs to functions, which are imported only when called."""

from __future__ import annotations

import errno
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modtrain.cli.arguments import Arguments, make_parser, read_arguments
from modtrain.cli.local_ranks import TRAIN_SEVERAL, local_ranks
from modtrain.cli.process_ends import (
    ignore_interrupts,
    interrupted_text,
    launched_rank,
    print_all_characters,
)
from modtrain.common.errors import ConfigError, ModtrainError, Problem, RankError, raise_if_any
from modtrain.common.terminal import last_output, stop_printing

Verb = Callable[[list[str], str | None], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 2 for a wrong configuration or command."""
    verbs = {name: description for name, (_, description) in _VERBS.items()}
    if argv is None and "_ARGCOMPLETE" in os.environ:
        from modtrain.cli.completion import complete

        complete(verbs)
    arguments = Arguments()
    print_all_characters()
    try:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv, verbs)
        if arguments.wants_help:
            return _help(arguments.verb, verbs)
        from modtrain.training.job_scratch import use_job_scratch
        from modtrain.training.outcome import report_outcome

        with report_outcome() as outcome:
            use_job_scratch()
            # Without ranks of its own, rank 0 does it, once.
            has_own = arguments.verb in _TRAINING or _shares_work(arguments)
            if has_own or launched_rank(has_ranks=False) == 0:
                outcome.exit_code = _run(arguments)
        with last_output():
            sys.stdout.flush()
        return outcome.exit_code
    except (ModtrainError, OSError, KeyboardInterrupt) as error:
        if argv is None and isinstance(error, KeyboardInterrupt):
            ignore_interrupts()
        return _report(error, arguments)


def _shares_work(arguments: Arguments) -> bool:
    """Whether each of the processes that were started together has a part of its own."""
    return arguments.verb == "prepare" and any(word.startswith("task=") for word in arguments.words)


def _report(error: BaseException, arguments: Arguments) -> int:
    """Print what ended the command, and return its exit code."""
    has_ranks, is_resumable = arguments.verb in _TRAINING, arguments.verb in _RESUMABLE
    program = f"modtrain {arguments.verb}".rstrip()
    if isinstance(error, ModtrainError):
        # Errors that all ranks raise are printed by rank 0 only, if it lives.
        is_everywhere = isinstance(error, ConfigError | RankError)
        is_here = not is_everywhere or getattr(error, "is_reported_here", False)
        if is_here or launched_rank(has_ranks) == 0:
            lines = [f"{program}: {error}", *getattr(error, "__notes__", ())]
            cause = error.__cause__
            if isinstance(cause, OSError) and not any("remedy: " in line for line in lines):
                lines += _storage_remedy(cause, arguments.verb)
            print("\n".join(lines), file=sys.stderr)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        stop_printing()
        if arguments.verb in _SHOWING or arguments.wants_help:
            return 0
        more = "; the same command resumes" if is_resumable else ""
        print(f"{program}: the reader of the output has closed the pipe{more}", file=sys.stderr)
        return 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        lines = [f"{program}: {where}{error.strerror or error}"]
        lines += _storage_remedy(error, arguments.verb)
        print("\n".join(lines), file=sys.stderr)
        return 1
    from modtrain.training.stop_signal import show_cursor

    show_cursor()
    print(f"\n{interrupted_text(is_resumable)}", file=sys.stderr)
    return 130


def _storage_remedy(error: OSError, verb: str) -> list[str]:
    """Return the line with what to do where a file system is full, or not to be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        more = "; the same command continues" if verb in _RESUMABLE else ""
        return [f"remedy: free space, or write elsewhere{more}"]
    if error.errno == errno.EROFS:
        key = "runs_dir" if verb in _TRAINING else "output" if verb in _WITH_OUTPUT else None
        elsewhere = f": {key}=PATH" if key else ""
        return [f"remedy: mount it writable, or write elsewhere{elsewhere}"]
    return []


def _run(arguments: Arguments) -> int:
    from modtrain.cli.home_paths import expand_words

    name, config_dir = arguments.verb, arguments.config_dir
    words = expand_words(arguments.words)
    if config_dir is not None:
        config_dir = str(Path(config_dir).expanduser())
    if name in _TRAINING:
        # Before the imports that take seconds: a signal during them must not be lost.
        from modtrain.training.stop_signal import STOP

        STOP.install()
    if any(word.startswith("from=") for word in words):
        from modtrain.cli.base_config import expand_base

        words = expand_base(name, words, config_dir)
    if (ranks := local_ranks("train -m" if arguments.is_multirun else name, words)) is not None:
        from modtrain.cli.start_ranks import start_ranks

        return start_ranks(name, ranks, config_dir)
    verb = _sweep if arguments.is_multirun else _VERBS[name][0]
    if isinstance(verb, str):
        verb = partial(_call, name, verb)
    return verb(words, config_dir)


def _help(verb: str, verbs: dict[str, str]) -> int:
    if not verb:
        print(make_parser(verbs).format_help(), end="")
        return 0
    from modtrain.cli.verb_help import verb_help

    print(verb_help(verb, verbs[verb]))
    return 0


def _call(verb: str, target: str, overrides: list[str], config_dir: str | None) -> int:
    """Call ``target`` with the configuration of ``verb``; print its result, if not an exit code.

    target: ``module:function``.
    """
    from modtrain.cli import compose, compose_verbs

    composers: dict[str, Callable[..., Any]] = {
        "compare": compose_verbs.compose_arms,
        "isoflop": compose_verbs.compose_isoflop,
        "search": compose_verbs.compose_search,
        "search-patterns": compose_verbs.compose_pattern_search,
        "submit": compose_verbs.compose_submission,
    }
    config = composers.get(verb, partial(compose.compose, verb))(overrides, config_dir)
    from modtrain.training.stop_signal import STOP

    # Of what trains: the configuration itself, or a part of it.
    training = getattr(config, "config", config) if verb in _TRAINING else None
    with STOP.time_limit(getattr(training, "max_seconds", None)):
        result = pkgutil.resolve_name(target)(config)
    if isinstance(result, int):
        return result
    if result is not None:
        with last_output():
            print(result)
    return 0


def _train(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    swept = [o for o in overrides if o.lstrip("+~").startswith(("hydra.", "hydra/", "sweep."))]
    reason, remedy = "is for a sweep", "add -m, or leave it out"
    raise_if_any([Problem(text, "", reason, remedy) for text in swept])
    config = compose("train", overrides, config_dir)
    from modtrain.distributed.launch import Launch
    from modtrain.training.plan import resolve

    launch = Launch.from_environment()
    config, plan = resolve(config, launch=launch)
    from modtrain.training.hardware import num_devices, resolve_accelerator
    from modtrain.training.one_process import one_process_note
    from modtrain.training.run import train

    device = resolve_accelerator(config.strategy.accelerator)
    strategy = config.strategy
    if note := one_process_note(strategy, launch, device, num_devices(device), overrides):
        print(note, file=sys.stderr)
    return train(config, plan=plan).exit_code


def _sweep(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose
    from modtrain.cli.compose_verbs import compose_job
    from modtrain.experiments.sweep.sweep import sweep

    compose_train = partial(compose, "train", config_dir=config_dir)
    compose_slurm_job = partial(compose_job, config_dir=config_dir)
    return sweep(overrides, compose_train, compose_slurm_job, config_dir)


def _eval(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    config = compose("eval", overrides, config_dir)
    if config.tasks is not None:
        from modtrain.inference.tasks.evaluate_tasks import evaluate_tasks
        from modtrain.inference.tasks.report import show_tasks

        scores = evaluate_tasks(config)
        with last_output():
            show_tasks(scores)
        return 0
    from modtrain.inference.evaluate.evaluate import evaluate_run
    from modtrain.inference.evaluate.reporting import show

    figures = evaluate_run(config)
    with last_output():
        show(figures)
    return 0


def _inspect(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    config = compose("inspect", overrides, config_dir)
    from modtrain.inference.inspect.inspect import inspect_run

    page = inspect_run(config)
    with last_output():
        print(f"wrote {page}")
    return 0


def _status(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    config = compose("status", overrides, config_dir)
    from modtrain.cluster.status import show_status, wide_console

    if config.sweep is None or config.problems():
        show_status(config)
        return 0
    from modtrain.experiments.sweep.sweep_status import sweep_table

    console = wide_console()
    console.print(sweep_table(Path(config.runs_dir) / config.sweep, console.width))
    return 0


def _config(words: list[str], config_dir: str | None) -> int:
    from modtrain.cli.print_config import composed_yaml

    print(composed_yaml(words, config_dir))
    return 0


def _completion(words: list[str], config_dir: str | None) -> int:
    del config_dir
    from modtrain.cli.completion import shell_code

    print(shell_code(words))
    return 0


def _doctor(overrides: list[str], config_dir: str | None) -> int:
    del config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from modtrain.cli.doctor import show

    require: list[str] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            requested = override.value() if override.key_or_group == "require" else None
        except HydraException:
            requested = None
        if not isinstance(requested, str | list):
            remedy = "write require=[packages,cuda] or leave it out"
            raise ConfigError([Problem(text, "", "doctor takes only require=[...]", remedy)])
        require += [requested] if isinstance(requested, str) else [str(need) for need in requested]
    return show(require)


# Verbs that train, and save on a signal.
_TRAINING = ("train", *TRAIN_SEVERAL)
# Those, and others that keep what is finished.
_RESUMABLE = (*_TRAINING, "prepare")
# Those that take ``output=``.
_WITH_OUTPUT = ("prepare", "eval", "fit", "report", "inspect", "export", "data")
# What they print is all that they do.
_SHOWING = (
    *("", "completion", "config", "data", "doctor", "generate", "logs", "plan", "status", "wait"),
)
# What a verb calls, ``module:function`` with the verb's configuration, and a line of help.
_VERBS: dict[str, tuple[str | Verb, str]] = {
    "prepare": ("modtrain.data.prepare.shared:prepare_task", "text to tokenizer and shards"),
    "train": (_train, "train a run, or resume it"),
    "compare": (
        "modtrain.experiments.compare.compare:compare",
        "train several models on one budget and report them side by side",
    ),
    "isoflop": (
        "modtrain.experiments.isoflop.isoflop:isoflop",
        "train a grid of models of several families at equal training FLOPs",
    ),
    "eval": (_eval, "held-out losses of a run, causal and not; or its scores on tasks"),
    "search": (
        "modtrain.experiments.search.search:search",
        "search the best values of some keys, with Optuna",
    ),
    "search-patterns": (
        "modtrain.experiments.pattern_search.pattern_search:search_patterns",
        "search the capacity of each layer, by successive halving",
    ),
    "fit": (
        "modtrain.experiments.fit.fit:fit",
        "a scaling law from a file of losses, parameters, tokens and FLOPs",
    ),
    "report": (
        "modtrain.experiments.report.report:report",
        "a page with figures and tables of runs, sweeps, comparisons or isoFLOP grids",
    ),
    "inspect": (_inspect, "a page that shows what a run's routers do with a text"),
    "generate": ("modtrain.inference.generate.generate:generate", "continue texts with a run"),
    "export": ("modtrain.interop.export:export", "a run as a Hugging Face folder"),
    "import": (
        "modtrain.interop.import_model:import_model",
        "a model of a Hugging Face folder or a GGUF file as a run",
    ),
    "checkpoints": (
        "modtrain.cli.checkpoints:run_checkpoints",
        "list, verify, prune or consolidate a run's checkpoints",
    ),
    "data": (
        "modtrain.inference.data_view.view:view_data",
        "what is in prepared data, and which documents a step of a run read",
    ),
    "submit": ("modtrain.cluster.submit:submit", "train, prepare, eval, ... as a Slurm job"),
    "status": (_status, "state, step, loss, restarts, checkpoint and job of runs"),
    "logs": ("modtrain.cluster.logs:show_logs", "output of a run's newest job"),
    "wait": ("modtrain.cluster.wait:wait_for_run", "until a run is complete, failed or stopped"),
    "cancel": ("modtrain.cluster.cancel:cancel_run", "end a run's jobs, after a checkpoint"),
    "plan": (
        "modtrain.training.plan_report:show",
        "parameters, FLOPs, steps and memory of a run, without starting it",
    ),
    "config": (_config, "the configuration that train, eval, ... would have, as YAML"),
    "completion": (_completion, "what bash, zsh or fish needs to complete modtrain's commands"),
    "doctor": (_doctor, "versions, devices, and what is missing on this machine"),
}
