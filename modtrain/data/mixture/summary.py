"""The indexes of a mixture's sources, as one. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields

from modtrain.common.atomic_io import digest
from modtrain.common.errors import DataError
from modtrain.data.stream.prepared import ITEM_SIZES, SPLITS, IndexSummary, SplitSummary


def combined_summary(summaries: Mapping[str, IndexSummary]) -> IndexSummary:
    """Return the summary of all sources together, by their names.

    Its sequence length is the longest that divides that of each source. Counts are sums. The
    fingerprint covers the names and the fingerprint of each source. Packing is each source's own.

    Raises:
        DataError: the sources were made with different tokenizers, or end documents differently.
    """
    by_tokenizer: dict[str, list[str]] = {}
    for name in sorted(summaries):
        by_tokenizer.setdefault(summaries[name].tokenizer_sha256, []).append(name)
    if len(by_tokenizer) > 1:
        groups = "; ".join(
            f"{', '.join(names)} have {sha[:12]}" for sha, names in by_tokenizer.items()
        )
        raise DataError(
            f"the sources of a mixture need one tokenizer: {groups}. Prepare all of them with one"
            " tokenizer.path=…/tokenizer.json"
        )
    members = list(summaries.values())
    ends = {name: summaries[name].eos_id for name in sorted(summaries)}
    if len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} by {number}" for name, number in ends.items())
        raise DataError(
            f"the sources of a mixture need one end-of-document token: {listed}. Prepare all of"
            " them with one tokenizer.end_token"
        )
    return IndexSummary(
        seq_len=math.gcd(*(member.seq_len for member in members)),
        vocab_size=members[0].vocab_size,
        eos_id=members[0].eos_id,
        dtype=max((member.dtype for member in members), key=lambda dtype: ITEM_SIZES[dtype]),
        tokenizer_sha256=members[0].tokenizer_sha256,
        fingerprint=digest([[name, summaries[name].fingerprint] for name in sorted(summaries)]),
        num_files=sum(member.num_files for member in members),
        flaws=dict(sum((Counter(member.flaws) for member in members), Counter())),
        splits={split: _sum([member.splits[split] for member in members]) for split in SPLITS},
        end_token=members[0].end_token,
    )


def _sum(splits: list[SplitSummary]) -> SplitSummary:
    names = [field.name for field in fields(SplitSummary)]
    return SplitSummary(**{name: sum(getattr(split, name) for split in splits) for name in names})
