"""The command line: verbs to functions, which are imported only when called."""

from __future__ import annotations

import argparse
import errno
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modtrain import __version__
from modtrain.common.errors import ConfigError, ModtrainError, Problem, RankError, raise_if_any

Verb = Callable[[list[str], str | None], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 2 for a wrong configuration or command."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.multirun and arguments.verb != "train":
        parser.error("-m sweeps over runs of train; another verb has one configuration")
    verb = _sweep if arguments.multirun else _VERBS[arguments.verb][0]
    if isinstance(verb, str):
        verb = partial(_call, arguments.verb, verb)
    try:
        if arguments.verb in _TRAINING:
            # Before the imports that take seconds: a signal during them must not be lost.
            from modtrain.training.stop_signal import STOP

            STOP.install()
        return verb(arguments.overrides + arguments.options, arguments.config_dir)
    except ModtrainError as error:
        # Errors that all ranks raise are printed by rank 0 only, if it lives.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        is_everywhere = isinstance(error, ConfigError | RankError)
        if rank == "0" or not is_everywhere or getattr(error, "is_reported_here", False):
            print(f"modtrain {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            remedy = "\nremedy: free space, or write elsewhere; the same command continues"
        text = f"{where}{error.strerror or error}{remedy}"
        print(f"modtrain {arguments.verb}: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command resumes", file=sys.stderr)
        return 130


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
    result = pkgutil.resolve_name(target)(config)
    if isinstance(result, int):
        return result
    if result is not None:
        print(result)
    return 0


def _train(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.training.outcome import report_outcome

    with report_outcome() as outcome:
        from modtrain.cli.compose import compose

        swept = [o for o in overrides if o.lstrip("+~").startswith(("hydra.", "hydra/", "sweep."))]
        reason, remedy = "is for a sweep", "add -m, or leave it out"
        raise_if_any([Problem(text, "", reason, remedy) for text in swept])
        config = compose("train", overrides, config_dir)
        from modtrain.distributed.launch import Launch
        from modtrain.training.plan import resolve

        config, plan = resolve(config, launch=Launch.from_environment())
        from modtrain.training.run import train

        ended = train(config, plan=plan)
        if ended.exit_code == 0:
            from modtrain.experiments.hparams import write_swept

            write_swept(ended.run)
        outcome.exit_code = ended.exit_code
        return outcome.exit_code


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
    from modtrain.inference.evaluate.evaluate import evaluate_run
    from modtrain.inference.evaluate.reporting import show

    show(evaluate_run(config))
    return 0


def _inspect(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    config = compose("inspect", overrides, config_dir)
    from modtrain.inference.inspect.inspect import inspect_run

    print(f"wrote {inspect_run(config)}")
    return 0


def _status(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.cli.compose import compose

    config = compose("status", overrides, config_dir)
    from modtrain.cluster.status import show_status, wide_console

    if config.sweep is None or config.problems():
        show_status(config)
        return 0
    from modtrain.experiments.sweep.sweep_status import sweep_table

    wide_console().print(sweep_table(Path(config.runs_dir) / config.sweep))
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
_TRAINING = ("train", "compare", "isoflop", "search", "search-patterns")
# What a verb calls, ``module:function`` with the verb's configuration, and a line of help.
_VERBS: dict[str, tuple[str | Verb, str]] = {
    "prepare": ("modtrain.data.prepare.pipeline:prepare", "text to tokenizer and shards"),
    "train": (_train, "train a run, or resume it"),
    "compare": (
        "modtrain.experiments.compare.compare:compare",
        "train several models on one budget and report them side by side",
    ),
    "isoflop": (
        "modtrain.experiments.isoflop.isoflop:isoflop",
        "train a grid of models of several families at equal training FLOPs",
    ),
    "eval": (_eval, "held-out losses of a run, causal and not"),
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
    "checkpoints": (
        "modtrain.cli.checkpoints:run_checkpoints",
        "list, verify, prune or consolidate a run's checkpoints",
    ),
    "data": (
        "modtrain.inference.step_samples:show_samples",
        "the samples that a step of a run read: numbers, shards, texts",
    ),
    "submit": ("modtrain.cluster.submit:submit", "train, prepare, eval, ... as a Slurm job"),
    "status": (_status, "state, step, loss, restarts, checkpoint and job of runs"),
    "logs": ("modtrain.cluster.logs:show_logs", "output of a run's newest job"),
    "cancel": ("modtrain.cluster.cancel:cancel_run", "end a run's jobs, after a checkpoint"),
    "plan": (
        "modtrain.training.plan_report:show",
        "parameters, FLOPs, steps and memory of a run, without starting it",
    ),
    "doctor": (_doctor, "versions, devices, and what is missing on this machine"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modtrain",
        description="Train Mixture-of-Depths language models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + "\n".join(f"  {name:15} {description}" for name, (_, description) in _VERBS.items())
        + "\n\noverrides are Hydra's: model=mod_60m model.capacity=0.25 budget.tokens=1e9",
    )
    parser.add_argument("--version", action="version", version=f"modtrain {__version__}")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="a directory of your own YAML, laid out as conf/ is"
    )
    # Options that stand for overrides.
    parser.set_defaults(options=[])
    for option, override, use in (
        ("--show-depth", "show_depth=true", "for generate"),
        ("--dry-run", "dry_run=true", "for submit, and sweeps on Slurm"),
        ("--plan", "plan_only=true", "for isoflop and search-patterns"),
    ):
        meaning = f"{use}, the same as {override}"
        parser.add_argument(
            option, dest="options", action="append_const", const=override, help=meaning
        )
    parser.add_argument(
        "--chain",
        dest="options",
        action="append",
        type="chain={}".format,
        metavar="N",
        help="for submit, the same as chain=N",
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="for train: a run for each of several values, as in model.capacity=0.1,0.2",
    )
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB", help="see below")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="key=value or group=name")
    return parser
