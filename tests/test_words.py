"""Identifiers that have given way to the field's terms, and must not come back.

Add a name to `BANNED`, with the one to use, once the package is free of it. Functions, classes,
arguments, attributes and variables of the package, the benchmarks and the documents' extensions
are checked; comments and texts are not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import modtrain

ROOT = Path(modtrain.__file__).parents[1]
FOLDERS = ("modtrain", "benchmarks", "docs")

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
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name, getattr(node, "lineno", 0)


def uses(source: str) -> list[tuple[int, str]]:
    return sorted((line, name) for name, line in identifiers(ast.parse(source)) if name in BANNED)


def test_identifiers_are_the_fields_terms():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}: use {BANNED[name]}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in uses(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_every_kind_of_identifier_is_looked_at():
    source = (
        "def hold(said, *told, **nobody): gone = room.wish\n"
        "class Dice: tick: int = 0\n"
        "import a as held; f(apart=1); [go_on for _ in b]\n"
        "'unless' # within\n"
    )
    names = {name for _, name in uses(source)}
    assert names == {
        *("hold", "said", "told", "nobody", "gone", "room", "wish", "Dice", "tick", "held"),
        *("apart", "go_on"),
    }
