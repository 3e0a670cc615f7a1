"""Small searches over patterns that the tests of this folder share."""

from dataclasses import replace
from functools import cache

from modtrain.cli.compose_verbs import compose_pattern_search
from modtrain.experiments.pattern_search.candidates import PatternSpace, find_candidates
from modtrain.experiments.pattern_search.pattern_search import PatternSearch

WSD = ("schedule.warmup_steps=2", "schedule.decay=0.3")
WITHOUT_DATA = ("data.seq_len=64", "model.vocab_size=300", "plan_only=true")
SMALL = ("batch.tokens=256", "batch.micro_batch_size=2", "budgets=[1e9,3e9]")


def search_arguments(tiny, *more, name="s"):
    """The command of a search whose runs take about a second each."""
    shared = [o for o in tiny if not o.startswith(("budget", "checkpoint"))]
    search = (f"name={name}", "budgets=[6e8,1.2e9]", "patterns=[every_other]", "num_drawn=3")
    return ["search-patterns", *search, *WSD, "checkpoint.every=100", *shared, *more]


@cache
def composed(*overrides: str) -> PatternSearch:
    return compose_pattern_search(["model=tiny", *SMALL, *WSD, *WITHOUT_DATA, *overrides])


@cache
def space(num_layers: int = 8, seq_len: int = 64) -> PatternSpace:
    model = replace(composed().base.model, num_layers=num_layers, vocab_size=300)
    return PatternSpace(model, seq_len)


def candidates(of: PatternSpace | None = None, **changes):
    """The candidates of a configuration with other values, without given patterns."""
    changes = {"patterns": [], "num_drawn": 9} | changes
    return find_candidates(replace(composed().config, **changes), of or space())[0]
