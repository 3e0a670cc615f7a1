"""Identifiers that have given way to the field's terms, and must not come back.

Add a name to `BANNED`, with the one to use, once the code is free of it. Functions, classes,
arguments, attributes and variables of the package, the benchmarks, the documents' extensions and
the tests are checked, and the words of test names; comments and texts are not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import modtrain

ROOT = Path(modtrain.__file__).parents[1]
FOLDERS = ("modtrain", "benchmarks", "docs", "tests")

BANNED = {
    # models
    "asking": "local_query_indices",
    "absorb": "update_running_stats",
    "observe": "batch_stats",
    "so_many": "floor_share",
    "widened": "to_fp32_or_wider",
    "filled_BK": "slot_mask",
    "within": "apply_cumulative_cap",
    "room": "capacity_factor",
    "joins_sequences": "depends_on_micro_batch",
    # inference
    "Dial": "ComputeBudget",
    "dial": "budget",
    "wish": "budget",
    "Dice": "PerSequenceRNG",
    "apart": "mask_documents",
    "_settle": "_roll_back_drafts",
    "made_tokens": "generated_tokens",
    "_Tally": "Accumulator",
    "_Tape": "TraceRecorder",
    # parallel, distributed
    "as_multiplied": "cast_for_autocast",
    "lengthened": "pad_to_multiple",
    "_become": "_swap_class",
    "_ApartExperts": "TPExperts",
    "_PartNorm": "TPHeadNorm",
    "SpreadMLPs": "ExpertParallelMLPs",
    "Sharded": "FSDPStrategy",
    "check_alike": "check_rank_consistency",
    "together": "raise_on_all_ranks",
    "tick": "heartbeat",
    "post": "publish_failure",
    # training, checkpoint
    "Judged": "SpikeReport",
    "leave_out": "skip_step",
    "unless": "restore_if",
    "Crew": "Ranks",
    # common, cluster, experiments
    "written_aside": "atomic_writer",
    "hold_lock": "acquire_lock",
    "run_apart": "run_in_process",
    "is_held": "is_in_use",
    "hold": "acquire",
    "held": "stored",
    "go_on": "resume",
    "went_on": "last_active",
    # of anything
    "told": "the thing's own name",
    "said": "the thing's own name",
    "say": "print_line",
    "nobody": "padding, or the thing's own name",
    "whoever": "the thing's own name",
    "gone": "removed",
    "found": "the name of the things",
}
# As one of the words of a test's name.
BANNED_IN_TEST_NAMES = {
    "told": "reported",
    "tells": "reports",
    "said": "printed",
    "says": "prints, names",
    "nobody": "no token, padding, or the thing's own name",
    "whoever": "the thing's own name",
    "gone": "removed",
    "apart": "separately",
    "dial": "budget",
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def uses(source: str) -> list[tuple[int, str, str]]:
    """Lines with a banned name, the name or the word of it, and what to use."""
    lines = []
    for name, line in identifiers(ast.parse(source)):
        if name in BANNED:
            lines.append((line, name, BANNED[name]))
        if name.startswith("test_"):
            words = BANNED_IN_TEST_NAMES.keys() & name.split("_")
            lines += [(line, word, BANNED_IN_TEST_NAMES[word]) for word in words]
    return sorted(lines)


def test_identifiers_are_the_fields_terms():
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}: use {better}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name, better in uses(path.read_text())
    ]
    assert not problems, "\n".join(problems)


def test_every_kind_of_identifier_is_looked_at():
    source = (
        "def hold(said, *told, **nobody): gone = room.wish\n"
        "class Dice: tick: int = 0\n"
        "import a as held; f(apart=1); [go_on for _ in b]\n"
        "def test_what_is_told(): pass\n"
        "'unless' # within\n"
    )
    names = {name for _, name, _ in uses(source)}
    assert names == {
        *("hold", "said", "told", "nobody", "gone", "room", "wish", "Dice", "tick", "held"),
        *("apart", "go_on"),
    }
