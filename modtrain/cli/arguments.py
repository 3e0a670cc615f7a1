"""The words of a command line: options, the verb, its overrides. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modtrain import __version__
from modtrain.cli.schemas import VERBS, schema_of
from modtrain.common.errors import Problem, raise_if_any
from modtrain.common.other_tools import CHOICES, KEYS, key_here, sentence_for, value_here

# Options that stand for overrides: the option, the override, what for.
_SHORT_FORMS = (
    ("--show-depth", "show_depth=true", "for generate"),
    ("--dry-run", "dry_run=true", "for submit, and sweeps on Slurm"),
    ("--conventions", "conventions=true", "for plan"),
    ("--plan", "plan_only=true", "for isoflop and search-patterns"),
)
_OWN_OPTIONS = (
    *("--help", "--version", "--config-dir", "--multirun", "--chain", "--cfg"),
    *(option for option, _, _ in _SHORT_FORMS),
)
# What stands among the overrides of a verb and is no key of its configuration.
_COMMAND_KEYS = ("from", "launch", "num_processes", "hydra", "sweep")
# Options of Hydra and of Lightning's command line that have another form here.
_CONFIG_FILE = "write from={value}: a run, or a YAML file, whose configuration is the base"
_FOREIGN = {
    **dict.fromkeys(("--config", "--config_file", "--config-file"), _CONFIG_FILE),
    **dict.fromkeys(
        ("--config-name", "-cn"),
        "a verb has one configuration: write experiment={value}, or from={value} for a file",
    ),
    **dict.fromkeys(("--config-path", "-cp"), "write --config-dir {value}"),
    **dict.fromkeys(
        ("--print_config", "--print-config", "--info", "-i"),
        "modtrain config VERB … prints what is composed; modtrain doctor what is installed",
    ),
    **dict.fromkeys(("--hydra-help",), "modtrain VERB --help lists the keys and groups"),
    **dict.fromkeys(("--run", "-r", "--resolve"), "leave it out: that is what happens"),
    **dict.fromkeys(("--package", "-p"), "leave it out: keys are written in full"),
    "--multi": "write -m",
    "-cd": "write --config-dir {value}",
    "--experimental-rerun": "write from=RUN: another run with the configuration of that one",
    **dict.fromkeys(
        ("--verbose", "-v", "--quiet", "-q"),
        "leave it out: log.every says how often a step is printed",
    ),
    **dict.fromkeys(
        ("--shell-completion", "-sc"), "modtrain completion bash|zsh|fish prints what a shell needs"
    ),
}
_CONFIG_OPTIONS = ("--cfg", "-c")
_CONFIGURATION = "modtrain config VERB … prints the configuration of a verb"
# What verbs are called by others, or by habit.
_OTHER_VERBS = {
    **dict.fromkeys(("pretrain", "finetune", "fine-tune", "sft", "run", "start"), "train"),
    **dict.fromkeys(("evaluate", "test", "validate", "score", "bench", "benchmark"), "eval"),
    **dict.fromkeys(("sample", "predict", "complete", "infer", "chat", "gen"), "generate"),
    **dict.fromkeys(("ls", "list", "ps", "runs", "squeue"), "status"),
    **dict.fromkeys(("tokenize", "preprocess", "prep", "dataset"), "prepare"),
    **dict.fromkeys(("kill", "stop", "scancel"), "cancel"),
    **dict.fromkeys(("tail", "log"), "logs"),
    **dict.fromkeys(("optimize", "tune", "hpo"), "search"),
    **dict.fromkeys(("sbatch", "launch", "slurm"), "submit"),
    **dict.fromkeys(("env", "check", "collect-env"), "doctor"),
    **dict.fromkeys(("visualize", "view", "show", "explain"), "inspect"),
    **dict.fromkeys(("checkpoint", "ckpt", "consolidate"), "checkpoints"),
    "convert": "export",
}
_VERB_SENTENCES = {
    **dict.fromkeys(("resume", "continue", "restart"), "modtrain train name=NAME resumes a run"),
    "sweep": "modtrain train -m trains a run for each of several values",
    "version": "modtrain --version prints it",
    **dict.fromkeys(("print-config", "cfg"), _CONFIGURATION),
    "tensorboard": "it is a program of its own: tensorboard --logdir runs",
}


@dataclass
class Arguments:
    """What a command line says. words: the overrides, and what options stand for."""

    verb: str = ""
    words: list[str] = field(default_factory=list)
    config_dir: str | None = None
    is_multirun: bool = False
    wants_help: bool = False


def read_arguments(argv: Sequence[str], verbs: Mapping[str, str]) -> Arguments:
    """Return what ``argv`` says. verbs: each with a line of help.

    Raises:
        ConfigError: an option or a verb is not known; says what to write instead.
        SystemExit: argparse has printed a version, or what is wrong.
    """
    parser = make_parser(verbs)
    # Only words follow two dashes, as job scripts write them.
    end = list(argv).index("--") if "--" in argv else len(argv)
    own, foreign = _split(argv[:end], parser)
    parsed = parser.parse_intermixed_args(own)
    verb, *words = [*parsed.words, *argv[end + 1 :]] or [""]
    wants_help = parsed.help or verb == "help"
    if verb == "help":
        verb, *words = words or [""]
    if not verb and not wants_help and not foreign:
        parser.error("the first word is a verb: see modtrain --help")
    problems = _verb_problems(verb, verbs) if verb else []
    shows_config = [value for option, value in foreign if option in _CONFIG_OPTIONS]
    if shows_config and shows_config[0] in ("", "job", "all"):
        foreign = [(o, v) for o, v in foreign if o not in (*_CONFIG_OPTIONS, "--resolve")]
        words = words if verb == "config" else [verb, *words]
        verb = "config"
    if foreign:
        keyed = words[0] if verb in ("submit", "config") and words else verb
        known = _keys_of(keyed)
        problems += [_problem(keyed, option, value, known) for option, value in foreign]
    raise_if_any(problems)
    if parsed.multirun and verb not in ("train", "config"):
        parser.error("-m sweeps over runs of train; another verb has one configuration")
    return Arguments(verb, words + parsed.options, parsed.config_dir, parsed.multirun, wants_help)


def make_parser(verbs: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the parser of all options; the verb and its overrides are its ``words``."""
    parser = argparse.ArgumentParser(
        prog="modtrain",
        usage="modtrain VERB [OVERRIDE ...] [options]",
        description="Train Mixture-of-Depths language models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs:\n"
        + "\n".join(f"  {name:15} {description}" for name, description in verbs.items())
        + "\n\noverrides are Hydra's: model=mod_60m model.capacity=0.25 budget.tokens=1e9"
        + "\nmodtrain VERB --help lists the keys, groups and examples of a verb",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this, or that of a verb")
    parser.add_argument("--version", action="version", version=f"modtrain {__version__}")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="a directory of your own YAML, laid out as conf/ is"
    )
    parser.set_defaults(options=[])
    for option, override, use in _SHORT_FORMS:
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
    parser.add_argument("--cfg", metavar="job", help="print the configuration that is composed")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    return parser


def _split(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the words that the parser knows, and the other options with their values."""
    known = parser._option_string_actions
    own: list[str] = []
    foreign: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option, sign, value = word.partition("=")
        is_option = word[:1] == "-" and word[1:2] not in ("", *"0123456789.")
        if not is_option or (option in known and option not in _CONFIG_OPTIONS):
            own.append(word)
            if is_option and not sign and known[option].nargs is None and rest:
                own.append(rest.pop(0))
            continue
        if not sign and rest and "=" not in rest[0] and rest[0][:1] != "-":
            value = rest.pop(0)
        foreign.append((option, value))
    return own, foreign


def _keys_of(verb: str) -> list[str]:
    """Return the keys of a verb; those that other tools have names for, where it has none."""
    if verb not in VERBS:
        return list(KEYS)
    # A command line without such mistakes needs neither.
    from omegaconf import OmegaConf  # noqa: PLC0415

    from modtrain.common.config_keys import all_keys  # noqa: PLC0415

    return all_keys(OmegaConf.structured(schema_of(verb)))


def _problem(verb: str, option: str, value: str, known: Sequence[str]) -> Problem:
    """Return the problem of an option that is not one of modtrain's. known: the verb's keys."""
    reason = "is not an option"
    if option in _CONFIG_OPTIONS:
        return Problem(option, value, "shows the configuration of a job", f"write {option} job")
    if option in ("--run", "-r") and value:
        return Problem(option, value, reason, f"write run={value}: keys are given without dashes")
    foreign = _FOREIGN.get(option, "").format(value=value or "NAME")
    if remedy := foreign or _own_option(option, known):
        return Problem(option, value, reason, remedy)
    name = option.lstrip("-").replace("-", "_")
    if name not in known and (sentence := sentence_for(name, value, known)):
        return Problem(option, value, reason, sentence)
    return Problem(option, value, reason, _key_for(verb, name, value, known))


def _key_for(verb: str, name: str, value: str, known: Sequence[str]) -> str:
    """Return the remedy for an option ``--name value``: the override that is meant."""
    is_here = name in known or name in CHOICES
    key = name if is_here else key_here(name, known, list(CHOICES)) or name
    is_guess = key == name and not is_here and _is_no_key(verb, name, known)
    if is_guess:
        from modtrain.common.config_keys import nearest_keys  # noqa: PLC0415

        near = nearest_keys(name, known) if len(name) > 1 else []
        if not near:
            return f"modtrain {verb} --help lists the keys"
        key = near[0]
    text = value_here(key, value) or "VALUE"
    is_plain = re.fullmatch(r"[\w.,+-]+", text) is not None
    override = f"{key}={text}" if is_plain else shlex.quote(f'{key}="{text}"')
    meant = f"did you mean {override}? Keys" if is_guess else f"write {override}: keys"
    return f"{meant} are given without dashes"


def _own_option(option: str, known: Sequence[str]) -> str | None:
    """Return the remedy where ``option`` is one of modtrain's, misspelled or cut short."""
    name = re.sub("[-_]", "", option)
    if len(name) < 2 or option.lstrip("-").replace("-", "_") in known:
        return None
    own = {word.replace("-", ""): word for word in _OWN_OPTIONS}
    begun = [text for text in own if text.startswith(name)]
    near = begun if len(begun) == 1 else difflib.get_close_matches(name, own, 1, 0.8)
    return f"did you mean {own[near[0]]}?" if near else None


def _is_no_key(verb: str, name: str, known: Sequence[str]) -> bool:
    """Whether ``verb`` has neither a key nor a group ``name``; a wrong verb may have any."""
    from modtrain.cli.groups import groups_of  # noqa: PLC0415

    top = name.partition(".")[0]
    return verb in VERBS and top not in (*known, *groups_of(verb), *_COMMAND_KEYS)


def _verb_problems(verb: str, verbs: Mapping[str, str]) -> list[Problem]:
    if verb in verbs:
        return []
    if "=" in verb:
        remedy = f"name a verb first, as in modtrain train {verb}"
        return [Problem(verb, "", "is not a verb", remedy)]
    if verb.lower() in _VERB_SENTENCES:
        return [Problem(verb, "", "is not a verb", _VERB_SENTENCES[verb.lower()])]
    other = _OTHER_VERBS.get(verb.lower())
    near = [other] if other else difflib.get_close_matches(verb.lower(), verbs, 1)
    remedy = f"did you mean {near[0]}? " if near else ""
    return [Problem(verb, "", "is not a verb", f"{remedy}modtrain --help lists them")]
