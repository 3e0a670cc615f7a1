"""Corpora that others have tokenised, in the layouts that their programs write.

nanoGPT's and OLMo's files are written here by their published layouts; those of Megatron, MosaicML
and LitData by their own writers where these are installed, and else by their layouts.
"""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from modtrain.common.errors import ConfigError, DataError
from modtrain.common.reading import read_json
from modtrain.data.config import TokenizerConfig
from modtrain.data.prepare.pipeline import prepare
from modtrain.data.prepare.sources import SourceFile, expand_sources
from modtrain.data.prepare.tokenized import kinds
from modtrain.data.prepare.tokenized.documents import TokenDocument, TokenReader, Vocabulary
from modtrain.data.prepare.tokenized.files import mds_parts
from modtrain.data.prepare.tokenizer import DocumentEncoder, train_tokenizer
from tests.data.data_cases import make_documents, tiny_config, trained_on

EOS = 0
VOCABULARY = Vocabulary(300, EOS, np.ones(300, np.int64))
DOCUMENTS = [[5, 6, 7], [8], [299, 1, 2, 3, 4], list(range(1, 200))]


def read(file: SourceFile, dtype: str | None = None, max_bytes: int = 1 << 20, column="tokens"):
    """The documents of a file, whether each is ended, and the kinds and places of its flaws."""
    reader = TokenReader(
        file, VOCABULARY, default_dtype="uint16", dtype=dtype, column=column, max_bytes=max_bytes
    )
    items = [*reader]
    documents = [item for item in items if isinstance(item, TokenDocument)]
    flaws = [(item.kind, item.line) for item in items if not isinstance(item, TokenDocument)]
    return [d.tokens.tolist() for d in documents], [d.is_ended for d in documents], flaws


def concatenated(lists):
    return [item for items in lists for item in items]


def read_all(source: Path, **options):
    results = [read(file, **options) for file in expand_sources([str(source)])]
    return [concatenated(parts) for parts in zip(*results, strict=True)]


def ended(documents: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array([*document, EOS]) for document in documents])


def write_megatron(path: Path, documents: list[list[list[int]]], code: int = 8) -> None:
    """Documents of one or more sequences, and their index."""
    dtype = {8: np.uint16, 4: np.int32}[code]
    sequences = [sequence for document in documents for sequence in document]
    path.write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    lengths = np.array([len(s) for s in sequences], np.int32)
    pointers = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * np.dtype(dtype).itemsize
    ends = np.cumsum([0, *(len(document) for document in documents)], dtype=np.int64)
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(ends))
    content = head + lengths.tobytes() + pointers.tobytes() + ends.tobytes()
    path.with_suffix(".idx").write_bytes(content)


def write_items(path: Path, items: list[bytes], header: bytes = b"") -> None:
    """The layout that MDS shards and LitData's chunks share: count, offsets, header, items."""
    start = 4 + 4 * (len(items) + 1) + len(header)
    offsets = np.cumsum([start, *(len(item) for item in items)]).astype("<u4")
    path.write_bytes(struct.pack("<I", len(items)) + offsets.tobytes() + header + b"".join(items))


def write_mds(folder: Path, documents: list[list[int]], zipped: bool = False) -> None:
    """A shard with a text before the tokens, which are 64-bit numbers as plain bytes."""
    folder.mkdir()
    items = []
    for document in documents:
        data = np.array(document, "<i8").tobytes()
        items.append(struct.pack("<II", 2, len(data)) + b"id" + data)
    path = folder / "shard.00000.mds"
    write_items(path, items, b"{}")
    raw = {"basename": path.name, "bytes": path.stat().st_size, "hashes": {}}
    entry = {
        "column_names": ["id", "tokens"],
        "column_encodings": ["str", "bytes"],
        "column_sizes": [None, None],
        "compression": "zstd:3" if zipped else None,
        "format": "mds",
        "raw_data": raw,
        "samples": len(items),
        "zip_data": {**raw, "basename": f"{path.name}.zstd"} if zipped else None,
    }
    if zipped:
        path.with_name(f"{path.name}.zstd").write_bytes(zstandard.compress(path.read_bytes()))
        path.unlink()
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [entry]}))


def write_litdata(folder: Path, items: list[list[int]], data_format: str = "no_header_tensor:16"):
    folder.mkdir()
    path = folder / "chunk-0-0.bin"
    write_items(path, [np.array(item, "<i4").tobytes() for item in items])
    chunk = {"filename": path.name, "chunk_size": len(items), "dim": sum(map(len, items))}
    config = {"data_format": [data_format], "compression": None, "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps({"chunks": [chunk], "config": config}))


# What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("layout", ["raw", "npy", "llmc"])
def test_end_tokens_end_the_documents_of_flat_files(tmp_path, dtype, layout):
    tokens = ended(DOCUMENTS).astype(dtype)
    path = tmp_path / ("a.npy" if layout == "npy" else "a.bin")
    header = np.zeros(256, "<i4")
    header[:3] = [20240520 if dtype == "<u2" else 20240801, 1, len(tokens)]
    if layout == "npy":
        np.save(path, tokens)
    else:
        path.write_bytes((header.tobytes() if layout == "llmc" else b"") + tokens.tobytes())
    given = {"<u2": None, "<u4": "uint32"}[dtype]
    assert read_all(path, dtype=given) == [DOCUMENTS, [True] * 4, []]


def test_other_numbers_than_expected_are_noticed(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(ended(DOCUMENTS).astype("<u4").tobytes())
    assert read_all(path) == [[], [], [("damaged", 1)]]
    path.write_bytes(b"odd")
    assert read_all(path) == [[], [], [("damaged", 1)]]
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert read_all(tmp_path / "b.npy") == [[], [], [("damaged", 1)]]


@pytest.mark.parametrize("layout", ["npy", "llmc"])
def test_a_flat_file_that_is_cut_short_is_damage(tmp_path, layout):
    """Its header says how many tokens there are."""
    tokens, path = ended(DOCUMENTS).astype("<u2"), tmp_path / f"a.{layout}"
    if layout == "npy":
        np.save(path, tokens)
    else:
        path = tmp_path / "a.bin"
        header = np.zeros(256, "<i4")
        header[:3] = [20240520, 1, len(tokens)]
        path.write_bytes(header.tobytes() + tokens.tobytes())
    path.write_bytes(path.read_bytes()[:-20])
    assert read_all(path) == [[], [], [("damaged", 1)]]


def test_a_flat_file_without_end_tokens_has_no_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("modtrain.data.prepare.tokenized.documents._BLOCK_TOKENS", 100)
    monkeypatch.setattr("modtrain.data.prepare.tokenized.documents._MIN_BLOCKS", 1)
    path = tmp_path / "a.bin"
    path.write_bytes(np.arange(1, 251, dtype="<u2").tobytes())
    documents, is_ended, flaws = read_all(path)
    assert (concatenated(documents), is_ended, flaws) == (list(range(1, 251)), [False] * 3, [])


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_blocks_do_not_show(tmp_path, monkeypatch, block):
    monkeypatch.setattr("modtrain.data.prepare.tokenized.documents._BLOCK_TOKENS", block)
    path = tmp_path / "a.bin"
    path.write_bytes(np.concatenate([ended(DOCUMENTS[:3]), [EOS, 9]]).astype("<u2").tobytes())
    assert read_all(path) == [[*DOCUMENTS[:3], [9]], [True] * 4, [("empty", 4)]]


@pytest.mark.parametrize("code", [4, 8])
def test_megatrons_index_and_end_tokens_end_documents(tmp_path, code):
    path = tmp_path / "a.bin"
    first, second, third, last = DOCUMENTS
    documents = [[first], [[*second, EOS]], [third[:2], [], third[2:]], [[*last, EOS, *first]]]
    write_megatron(path, documents, code)
    assert read_all(path) == [[*DOCUMENTS, first], [True] * 5, []]


@pytest.mark.parametrize("zipped", [False, True])
def test_items_of_mds_are_documents_or_parts_of_a_stream(tmp_path, zipped):
    write_mds(tmp_path / "items", DOCUMENTS, zipped)
    assert read_all(tmp_path / "items") == [DOCUMENTS, [True] * 4, []]
    stream = ended(DOCUMENTS).tolist()
    write_mds(tmp_path / "stream", [stream[n : n + 10] for n in range(0, len(stream), 10)], zipped)
    assert read_all(tmp_path / "stream") == [DOCUMENTS, [True] * 4, []]
    assert read_all(tmp_path / "items", column="ids")[2] == [("damaged", 1)]


def test_items_of_litdata(tmp_path):
    write_litdata(tmp_path / "items", DOCUMENTS)
    assert read_all(tmp_path / "items") == [DOCUMENTS, [True] * 4, []]
    write_litdata(tmp_path / "ends", [[*document, EOS] for document in DOCUMENTS])
    assert read_all(tmp_path / "ends") == [DOCUMENTS, [True] * 4, []]
    write_litdata(tmp_path / "pickled", DOCUMENTS, "pickle")
    assert read_all(tmp_path / "pickled") == [[], [], [("damaged", 1)]]


# What is wrong --------------------------------------------------------------------------------


def test_tokens_that_the_tokenizer_does_not_have_are_flaws(tmp_path):
    write_megatron(tmp_path / "a.bin", [[[1, 2]], [[3, 300]], [[-1]], [[4]]], 4)
    flaws = [("bad_token", 2), ("bad_token", 3)]
    assert read_all(tmp_path / "a.bin") == [[[1, 2], [4]], [True] * 2, flaws]


def test_a_document_that_is_too_large_is_a_flaw(tmp_path):
    write_megatron(tmp_path / "a.bin", [[[1]], [[1] * 9], [[2]]])
    assert read_all(tmp_path / "a.bin", max_bytes=32)[2] == [("too_large", 2)]


@pytest.mark.parametrize("name", ["a.bin", "a.idx"])
def test_any_damage_of_megatrons_files_is_found_or_harmless(tmp_path, name):
    path = tmp_path / name
    write_megatron(tmp_path / "a.bin", [[document] for document in DOCUMENTS])
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole[: draws.integers(len(whole))])
        if draws.random() < 0.5:
            content = bytearray(whole)
            content[draws.integers(len(whole))] = draws.integers(256)
        path.write_bytes(bytes(content))
        documents, _, flaws = read_all(tmp_path / "a.bin")
        assert flaws or all(0 < len(document) < 300 for document in documents)


def test_offsets_outside_of_an_items_file_are_damage(tmp_path):
    write_litdata(tmp_path / "a", DOCUMENTS)
    path = tmp_path / "a/chunk-0-0.bin"
    content = bytearray(path.read_bytes())
    for at, value in ((0, 1 << 31), (8, 1 << 30), (4, 0)):
        path.write_bytes(bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :]))
        assert read_all(tmp_path / "a")[2] == [("damaged", 1)]


def test_a_shard_that_grows_beyond_its_index_is_damage(tmp_path):
    write_mds(tmp_path / "a", DOCUMENTS, zipped=True)
    path = tmp_path / "a/shard.00000.mds.zstd"
    path.write_bytes(zstandard.compress(bytes(1 << 22)))
    assert read_all(tmp_path / "a")[2] == [("damaged", 1)]
    # Nor may the index ask for any size: a shard's offsets have 32 bits.
    index = json.loads((tmp_path / "a/index.json").read_text())
    index["shards"][0]["raw_data"]["bytes"] = 1 << 40
    (tmp_path / "a/index.json").write_text(json.dumps(index))
    (file,) = expand_sources([str(tmp_path / "a")])
    with pytest.raises(ValueError, match="offsets in a shard have 32 bits"):
        [*mds_parts(Path(file.path), "tokens", None)]


def test_folders_and_files_that_cannot_be_sources(tmp_path):
    write_mds(tmp_path / "a", DOCUMENTS)
    index = json.loads((tmp_path / "a/index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../shard.mds"
    (tmp_path / "a/index.json").write_text(json.dumps(index))
    write_megatron(tmp_path / "b.bin", [[[1]]])
    for source, words in [
        (tmp_path / "a", "names ../shard.mds, which is not in it"),
        (tmp_path / "b.idx", "Name that one"),
        ("memory://x/a.bin", "Fetch it first"),
    ]:
        with pytest.raises(DataError, match=words.replace(".", r"\.")):
            expand_sources([str(source)])


# All of it ------------------------------------------------------------------------------------


def test_prepare_gives_what_the_text_gives(tmp_path):
    """The same documents and shards, but for which ones are held out."""
    texts = make_documents(60)
    content = train_tokenizer(texts, 300)
    (tmp_path / "tokenizer.json").write_bytes(content)
    numbers = DocumentEncoder(content, "t").encode(texts)
    vocabulary_end = 0
    (tmp_path / "a.bin").write_bytes(
        b"".join(np.array([*d, vocabulary_end], "<u2").tobytes() for d in numbers)
    )
    write_megatron(tmp_path / "b.bin", [[document] for document in numbers])
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    summaries, trees = [], []
    for name in ("a", "b"):
        config = tiny_config([tmp_path / f"{name}.bin"], tmp_path / name, tokenizer=tokenizer)
        summaries.append(prepare(config, progress=False).summary)
        trees.append(trained_on(tmp_path / name))
    assert trees[0] == trees[1]
    splits = summaries[0].splits.values()
    assert sum(split.num_documents for split in splits) == 60
    assert sum(split.num_tokens for split in splits) == sum(len(d) + 1 for d in numbers)
    assert sum(split.num_bytes for split in splits) == sum(len(t.encode()) for t in texts)
    for changes in ({"tokenizer": TokenizerConfig()}, {"split_at": "line"}):
        config = tiny_config(
            [tmp_path / "a.bin"], tmp_path / "c", **{"tokenizer": tokenizer, **changes}
        )
        with pytest.raises(ConfigError, match="holds token numbers"):
            prepare(config, progress=False)


def test_a_small_file_without_end_tokens_has_a_part_that_is_held_out(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(make_documents(60), 300))
    np.arange(20_000, dtype="<u2").__mod__(256).__add__(1).tofile(tmp_path / "a.bin")
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    config = tiny_config([tmp_path / "a.bin"], tmp_path / "out", tokenizer=tokenizer)
    splits = prepare(config, progress=False).summary.splits
    assert sum(split.num_tokens for split in splits.values()) == 20_000
    assert all(split.num_sequences for split in splits.values())


def test_a_completed_index_makes_another_file(tmp_path):
    write_megatron(tmp_path / "b.bin", [[[1, 2, 3]], [[4]]])
    before = expand_sources([str(tmp_path / "b.bin")])
    index = tmp_path / "b.idx"
    index.write_bytes(index.read_bytes()[:-8])
    assert expand_sources([str(tmp_path / "b.bin")]) != before


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_megatrons_own_writer_writes(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    builder = module.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.dtype(dtype).type)
    for document in DOCUMENTS:
        lengths = [1, len(document) - 1] if len(document) > 1 else [1]
        builder.add_document(torch.tensor(document), lengths)
    builder.finalize(str(tmp_path / "a.idx"))
    assert read_all(tmp_path / "a.bin") == [DOCUMENTS, [True] * 4, []]


@pytest.mark.nightly
@pytest.mark.parametrize("encoding", ["bytes", "ndarray:int32", "ndarray", "ndarray:uint16"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_mosaicmls_own_writer_writes(tmp_path, encoding, compression):
    streaming = pytest.importorskip("streaming")
    dtype = {"bytes": "<i8", "ndarray": "int32"}.get(encoding, encoding.rpartition(":")[2])
    columns = {"tokens": encoding, "name": "str"}
    with streaming.MDSWriter(
        out=str(tmp_path / "a"), columns=columns, compression=compression, size_limit=700
    ) as writer:
        for document in DOCUMENTS:
            array = np.array(document, dtype)
            tokens = array.tobytes() if encoding == "bytes" else array
            writer.write({"name": "x", "tokens": tokens})
    assert read_all(tmp_path / "a") == [DOCUMENTS, [True] * 4, []]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_what_litdatas_own_writer_writes(tmp_path, kind):
    torch = pytest.importorskip("torch")
    writer_module = pytest.importorskip("litdata.streaming.writer")
    loader = pytest.importorskip("litdata.streaming.item_loader").TokensLoader()
    writer = writer_module.BinaryWriter(str(tmp_path), chunk_bytes=10_000, item_loader=loader)
    for number, document in enumerate(DOCUMENTS):
        array = np.array(document, np.int32)
        writer[number] = torch.from_numpy(array) if kind == "tensor" else array
    writer.done()
    writer.merge()
    assert read_all(tmp_path) == [DOCUMENTS, [True] * 4, []]


def test_the_index_of_a_folder_is_parsed_once(tmp_path, monkeypatch):
    folder = tmp_path / "mds"
    write_mds(folder, DOCUMENTS)
    index = json.loads((folder / "index.json").read_text())
    (shard,) = index["shards"]
    names = [f"shard.{number:05d}.mds" for number in range(20)]
    index["shards"] = [{**shard, "raw_data": {**shard["raw_data"], "basename": n}} for n in names]
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)
    (folder / "index.json").write_text(json.dumps(index))
    parsed = []

    def counted(path, *arguments):
        parsed.append(path)
        return read_json(path, *arguments)

    monkeypatch.setattr(kinds, "read_json", counted)
    files = expand_sources([str(folder)])
    assert [kinds.entry_of(Path(file.path))[1]["raw_data"]["basename"] for file in files] == names
    assert len(parsed) == 1
    # A changed one is another.
    index["shards"] = index["shards"][:5]
    (folder / "index.json").write_text(json.dumps(index))
    assert len(expand_sources([str(folder)])) == 5
    with pytest.raises(ValueError, match="does not name it"):
        kinds.entry_of(folder / names[7])
