"""Which paths are URLs, what can be wrong with one, and what is secret. Imports nothing heavy."""

from __future__ import annotations

import os
import re

from modtrain.common.errors import Problem
from modtrain.common.validation import key_of

DEFAULT_TIMEOUT = 60.0
"""Seconds for a request to a server."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)
# Which extra of modtrain brings the driver of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
# The user and the password before a host, and what follows the path of a web address.
_USER = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s?#'\"]+@", re.I)
_QUERY = re.compile(r"(https?://[^\s?#'\"]*)[?#][^\s'\"]*", re.I)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL such as ``s3://bucket/data``."""
    return bool(_URL.match(os.fspath(path)))


def without_secrets(text: str) -> str:
    """Return a URL, or a message with URLs, without signatures, users and passwords."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def url_problems(config: object, prefix: str, *names: str) -> list[Problem]:
    """Find fields with a URL that cannot be read, before anything is asked of the server."""
    problems = []
    for name in names:
        value = getattr(config, name)
        if is_url(value) and (fault := _fault(value)):
            problems.append(Problem(key_of(prefix, name), without_secrets(value), *fault))
    return problems


def _fault(url: str) -> tuple[str, str] | None:
    """What is wrong with the URL of a directory, and the remedy; None: nothing."""
    if fault := driver_fault(url):
        return fault
    if "?" in url or "#" in url:
        return "has a query, so that no name can follow it", "give the directory's plain address"
    # A revision of a repository on the hub is written like one.
    if _USER.match(url) and not url.lower().startswith("hf://"):
        # The configuration of a run is written to its directory.
        return "has a user or a password in it", "leave credentials to the driver, as ~/.netrc"
    return None


def driver_fault(url: str) -> tuple[str, str] | None:
    """What keeps a URL from being read, and the remedy; None if its driver is there."""
    # It takes a moment, for those who read from a URL.
    from fsspec.registry import get_filesystem_class  # noqa: PLC0415

    protocol = url.partition("://")[0].lower()
    try:
        get_filesystem_class(protocol)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'modtrain[{extra}]'" if extra else "install its fsspec driver"
        return f"needs a driver for {protocol}://, which is not installed", remedy
    except ValueError:
        return f"has the protocol {protocol}, which fsspec does not know", "try s3:// or https://"
    return None
