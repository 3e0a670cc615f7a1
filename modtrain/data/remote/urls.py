"""Which paths are URLs, and what can be wrong with one. Imports nothing heavy."""

from __future__ import annotations

import os
import re

from modtrain.common.errors import Problem
from modtrain.common.validation import key_of

DEFAULT_TIMEOUT = 60.0
"""Seconds for a request to a server."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)
# Of modtrain, by the protocol that they bring the driver of.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
"""Which extra of modtrain brings the driver of a protocol."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as ``s3://bucket/data``."""
    return bool(_URL.match(os.fspath(path)))


def url_problems(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find fields with a URL that cannot be read, before anything is asked of the server."""
    problems = []
    for name in names:
        value = getattr(config, name)
        if is_url(value) and (fault := _fault(value)):
            problems.append(Problem(key_of(prefix, name), value, *fault))
    return problems


def _fault(url: str) -> tuple[str, str] | None:
    """What is wrong with a URL, and the remedy; None if its driver is there."""
    # It takes a moment, for those who read from a URL.
    from fsspec.registry import get_filesystem_class  # noqa: PLC0415

    protocol = url.partition("://")[0].lower()
    try:
        get_filesystem_class(protocol)
    except ImportError:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'modtrain[{extra}]'" if extra else "install its fsspec driver"
        return f"needs a driver for {protocol}://, which is not installed", remedy
    except ValueError:
        return f"has the protocol {protocol}, which fsspec does not know", "try s3:// or https://"
    if "?" in url or "#" in url:
        return "has a query, so that no name can follow it", "give the directory's plain address"
    return None
