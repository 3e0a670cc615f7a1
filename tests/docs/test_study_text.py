"""The study's text: blocks of SWORD commentaries, and markup."""

import struct
import zlib

import pytest

from docs.reports.study.text import plain, sword_blocks


@pytest.mark.parametrize("letter", ["b", "c"])
def test_blocks_of_a_commentary_are_read_in_their_order(tmp_path, letter):
    texts = ["In the beginning\0and after", "", "Ünïcode " * 50]
    blocks = [zlib.compress(text.encode()) if text else b"" for text in texts]
    offsets = [sum(map(len, blocks[:number])) for number in range(len(blocks))]
    index = b"".join(
        struct.pack("<III", offset, len(block), len(text.encode()))
        for offset, block, text in zip(offsets, blocks, texts, strict=True)
    )
    (tmp_path / f"ot.{letter}zz").write_bytes(b"".join(blocks))
    (tmp_path / f"ot.{letter}zs").write_bytes(index)
    # A book without text has no block.
    assert list(sword_blocks(tmp_path, "ot", letter)) == [
        "In the beginning\nand after",
        "Ünïcode " * 50,
    ]


def test_plain_text_has_no_markup():
    marked_up = '<p class="x">Kings &amp; queens,\t\t <i>all</i> of\r\n \n\n them</p> '
    assert plain(marked_up) == "Kings & queens, all of\n\nthem"
