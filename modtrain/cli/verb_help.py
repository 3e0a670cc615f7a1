"""`modtrain VERB --help`: the keys, groups and examples of a verb."""

from __future__ import annotations

import re
import shutil
import textwrap

from modtrain.cli.compose import SCHEMAS
from modtrain.cli.groups import groups_of
from modtrain.cli.key_reference import Key, sections

EXAMPLES: dict[str, tuple[str, ...]] = {
    "prepare": (
        "corpus=files 'sources=[my/**/*.txt]' output=data/mine",
        "corpus=files 'sources=[input.txt]' split_at=line output=data/mine",
    ),
    "train": (
        "name=first model=tiny budget.tokens=1e5 batch.tokens=2048",
        "model=tiny budget.epochs=2 max_time=30m",
        "name=second from=first model.capacity=0.25",
        "-m name=swept budget.flops=1e12 model.capacity=0.125,0.25",
    ),
    "plan": ("model=mod_220m data.seq_len=2048 model.vocab_size=32000 budget.flops=6e18",),
    "compare": (
        "experiment=quickstart",
        """name=two budget.flops=1e12 'arms={a: ["model.capacity=0.5"], b: []}'""",
    ),
    "isoflop": ("experiment=isoflop_small --plan",),
    "search": ("study=mine budget.flops=1e12 'space.model.capacity=interval(0.05,0.5)'",),
    "search-patterns": ("name=patterns 'budgets=[1e12, 2e12]' --plan",),
    "eval": ("run=first", "run=first inference.capacity=0.25", "run=first 'sweep=[0.125, 1]'"),
    "generate": (
        "run=first 'prompt=\"My fellow citizens,\"' max_tokens=40 --show-depth",
        "run=first file=prompts.txt output=texts.jsonl",
    ),
    "inspect": ("run=first", "run=first 'text=\"Which tokens are worth computing?\"'"),
    "fit": ("points=points.csv output=fitted",),
    "report": ("'runs=[quickstart]' output=report",),
    "import": ("source=SmolLM2-135M name=smol", "source=model.gguf name=smol"),
    "export": ("run=first output=first-hf",),
    "checkpoints": ("run=first", "run=first action=verify", "run=first action=consolidate"),
    "data": ("run=first step=120",),
    "submit": (
        "train name=large model=mod_220m budget.flops=6e18 gpus_per_node=8 nodes=2 --dry-run",
    ),
    "status": ("", "run=first", "run=first cost=true"),
    "logs": ("run=first", "run=first follow=true"),
    "wait": ("run=first", "run=first timeout=3600"),
    "cancel": ("run=first",),
    "config": ("train model=tiny budget.steps=10", "eval run=first"),
    "completion": ("bash", "zsh", "fish"),
    "doctor": ("", "'require=[packages,cuda]'"),
}
"""Overrides of each verb that a user may begin with."""

_EXTENDS = "as train has them: modtrain train --help"
_INDENT = 8


def verb_help(verb: str, description: str) -> str:
    """Return what a verb is for, examples, its groups with their choices, and its keys."""
    lines = [f"modtrain {verb}: {description}", "", "examples:"]
    lines += [f"  modtrain {verb} {words}".rstrip() for words in EXAMPLES.get(verb, ())]
    if verb not in SCHEMAS:
        return "\n".join(lines)
    groups = groups_of(verb)
    if groups:
        lines += ["", "groups, written group=choice (the first is the default):"]
        for group, choices in groups.items():
            lines += _wrapped(f"{group}=", " ".join(choices))
    lines += ["", "keys, written key=value:"]
    for section in sections(verb):
        for key in section.keys:
            lines += _key_lines(key)
    if verb != "train" and issubclass(SCHEMAS[verb], SCHEMAS["train"]):
        lines += ["", f"all other keys: {_EXTENDS}"]
    return "\n".join(lines)


def _key_lines(key: Key) -> list[str]:
    meaning = re.sub(r"``?", "", key.meaning)
    return [f"  {key.name}={key.default}  ({key.annotation})", *_wrapped("", meaning, _INDENT)]


def _wrapped(head: str, text: str, indent: int = 2) -> list[str]:
    width = max(40, min(100, shutil.get_terminal_size().columns))
    first, more = " " * indent + head, " " * (indent + len(head))
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=more,
        break_long_words=False,
        break_on_hyphens=False,
    )
