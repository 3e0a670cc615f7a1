"""The command line: verbs to functions, nothing else.

Verbs import what they need only when called, so that help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from modtrain import __version__
from modtrain.errors import ConfigError, ModtrainError, Problem, RankError

Verb = Callable[[list[str], str | None], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 2 for a wrong configuration or command."""
    arguments = _parser().parse_intermixed_args(argv)
    verb = _VERBS[arguments.verb][0]
    overrides = [*arguments.overrides, *(["show_depth=true"] if arguments.show_depth else [])]
    try:
        return verb(overrides, arguments.config_dir)
    except ModtrainError as error:
        # Of what all ranks find, and of what one told the others, rank 0 speaks.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or not isinstance(error, ConfigError | RankError):
            print(f"modtrain {arguments.verb}: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"modtrain {arguments.verb}: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130


def _prepare(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose

    config = compose("prepare", overrides, config_dir)
    from modtrain.data.prepare import prepare

    _say("\n".join(prepare(config).lines()))
    return 0


def _train(overrides: list[str], config_dir: str | None) -> int:
    # Before the imports that take seconds: a signal during them must not be lost.
    from modtrain.training.preemption import STOP

    STOP.install()
    from modtrain.configuration import compose

    config = compose("train", overrides, config_dir)
    from modtrain.training.launch import Launch
    from modtrain.training.plan import resolve

    resolve(config, launch=Launch.from_environment())
    from modtrain.training.run import train

    return train(config).exit_code


def _compare(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.training.preemption import STOP

    STOP.install()
    from modtrain.configuration import compose_arms

    comparison = compose_arms(overrides, config_dir)
    from modtrain.experiments.compare import compare

    return compare(comparison)


def _eval(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose

    config = compose("eval", overrides, config_dir)
    from modtrain.inference.evaluate import evaluate_run
    from modtrain.inference.report import show

    show(evaluate_run(config))
    return 0


def _inspect(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose

    config = compose("inspect", overrides, config_dir)
    from modtrain.inference.inspect import inspect_run

    _say(f"wrote {inspect_run(config)}")
    return 0


def _generate(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose

    config = compose("generate", overrides, config_dir)
    from modtrain.inference.generate import generate

    generate(config)
    return 0


def _checkpoints(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose

    config = compose("checkpoints", overrides, config_dir)
    from modtrain.training.checkpoints_verb import run_checkpoints

    run_checkpoints(config)
    return 0


def _plan(overrides: list[str], config_dir: str | None) -> int:
    from modtrain.configuration import compose
    from modtrain.training.plan_report import show

    show(compose("plan", overrides, config_dir))
    return 0


def _doctor(overrides: list[str], config_dir: str | None) -> int:
    del config_dir
    from modtrain.doctor import show

    if overrides:
        problem = Problem(overrides[0], "", "doctor takes no overrides", "leave it out")
        raise ConfigError([problem])
    return show()


_VERBS: dict[str, tuple[Verb, str]] = {
    "prepare": (_prepare, "text to tokenizer and shards"),
    "train": (_train, "train a run, or go on with it"),
    "compare": (_compare, "train several models on one budget and report them side by side"),
    "eval": (_eval, "held-out losses of a run, causal and not"),
    "inspect": (_inspect, "a page that shows what a run's routers do with a text"),
    "generate": (_generate, "continue texts with a run"),
    "checkpoints": (_checkpoints, "list, verify, prune or consolidate a run's checkpoints"),
    "plan": (_plan, "what a run would take: parameters, FLOPs, steps, memory"),
    "doctor": (_doctor, "versions, devices, and what is missing here"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="modtrain",
        description="Train Mixture-of-Depths language models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + "\n".join(f"  {name:11} {what}" for name, (_, what) in _VERBS.items())
        + "\n\noverrides are Hydra's: model=mod_60m model.capacity=0.25 budget.tokens=1e9",
    )
    parser.add_argument("--version", action="version", version=f"modtrain {__version__}")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="a directory of your own YAML, laid out as conf/ is"
    )
    parser.add_argument(
        "--show-depth", action="store_true", help="for generate, the same as show_depth=true"
    )
    parser.add_argument("verb", choices=list(_VERBS), metavar="VERB", help="see below")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="key=value or group=name")
    return parser


def _say(text: str) -> None:
    print(text)  # noqa: T201
