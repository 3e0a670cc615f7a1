"""What prepared data depend on: stored beside them, and in the names of finished parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modtrain.common.atomic_io import digest
from modtrain.common.reading import UnreadableError, read_json
from modtrain.data.config import PrepareConfig
from modtrain.data.prepare.given_tokenizer import GivenTokenizer
from modtrain.data.prepare.sources import SourceFile

REQUEST_NAME = ".prepared.json"
TIMES = "times of change"
# Options that earlier versions did not have.
_LATER = (
    *("separator", "split_at", "max_document_bytes", "text_template", "max_flaws"),
    *("token_dtype", "token_column", "deduplicate", "packing"),
)


def request_of(
    config: PrepareConfig, files: Sequence[SourceFile], given: GivenTokenizer | None
) -> dict[str, Any]:
    """All that the output depends on, free of paths, so that the folders can be moved.

    given: the tokenizer that is not trained.
    """
    options = asdict(config)
    for name in ("sources", "output", "num_workers", "task"):
        del options[name]
    if given is None:
        options["tokenizer"] = tokenizer_options(config)
    else:
        options["tokenizer"] = {"sha256": given.sha256}
        if given.end_token is not None:
            options["tokenizer"]["end_token"] = given.end_token
    options = without_later_options(options)
    names, sizes = [file.name for file in files], [file.size for file in files]
    times = digest([file.mtime_ns for file in files])
    return {**options, "files": len(files), "contents": digest([names, sizes]), TIMES: times}


def tokenizer_options(config: PrepareConfig) -> dict[str, Any]:
    """Return what the training of a tokenizer depends on."""
    options = asdict(config.tokenizer)
    # Earlier versions did not have them, and they are for a tokenizer that is not trained.
    del options["end_token"], options["encoding"]
    return options


def differing_keys(output: Path, request: dict[str, Any]) -> list[str]:
    """Return the keys in which ``request`` differs from that of the data in ``output``."""
    try:
        stored = read_json(output / REQUEST_NAME)
    except (OSError, UnreadableError):
        stored = {}
    return sorted(key for key in {*request, *stored} if request.get(key) != stored.get(key))


def without_later_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options`` without those that earlier versions did not have, at their defaults.

    So data that were prepared before there was an option are those of its default.
    """
    defaults = {name: getattr(PrepareConfig, name) for name in _LATER}
    return {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}


def later_options(config: PrepareConfig) -> dict[str, Any]:
    """Return the options that earlier versions did not have, without those at their defaults."""
    return without_later_options({name: getattr(config, name) for name in _LATER})
