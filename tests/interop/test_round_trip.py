"""An imported model that is exported again: tokens, template, settings and origin are its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, GenerationConfig

from modtrain.common.errors import DataError, ModtrainError
from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.interop.config import ExportConfig, ImportConfig
from modtrain.interop.export import export
from modtrain.interop.folder import write_tokenizer
from modtrain.interop.import_model import import_model
from modtrain.interop.prompt_format import PromptFormat
from tests.interop.model_folders import FAMILIES, TEMPLATE, make_folder

TALK = [
    {"role": "user", "content": "the tree"},
    {"role": "assistant", "content": "and"},
    {"role": "user", "content": "the river"},
]
SETTINGS = {
    "bos_token_id": 270,
    "eos_token_id": [271, 0],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}


def chat_tokenizer() -> bytes:
    """A tokenizer that begins each text with a token."""
    parsed = Tokenizer.from_str(train_tokenizer(["the tree and the river"] * 4, 270).decode())
    parsed.add_special_tokens(["<|begin|>", "<|turn|>", "<|pad|>"])
    numbers = [("<|begin|>", parsed.token_to_id("<|begin|>"))]
    parsed.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=numbers
    )
    return parsed.to_str().encode()


def make_chat_folder(folder: Path) -> Path:
    """The folder of a chat model, with what a hostile one would name as well."""
    make_folder(folder, FAMILIES["llama"], chat_tokenizer())
    own = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|turn|>", "special": True},
        "pad_token": "<|pad|>",
        "model_max_length": 48,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "vocab_file": "/etc/passwd",
        "name_or_path": "somewhere",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    names = {key: own[key] for key in ("bos_token", "pad_token")} | {"eos_token": "<|turn|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = SETTINGS | {"compilation": {"backend": "x"}}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def round_trip(folder: Path, runs: Path, name: str = "imported") -> Path:
    import_model(ImportConfig(str(folder), name, str(runs)))
    output = runs.parent / f"exported-{name}"
    export(ExportConfig(name, str(runs), output=str(output)))
    return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a chat model, and what it is exported as."""
    root = tmp_path_factory.mktemp("chat")
    folder = make_chat_folder(root / "model")
    return folder, round_trip(folder, root / "runs")


def test_the_tokenizer_does_what_the_original_does(exported):
    original, again = (AutoTokenizer.from_pretrained(path) for path in exported)
    assert original("the tree")["input_ids"][0] == 270
    for generate in (True, False):
        expected = original.apply_chat_template(TALK, add_generation_prompt=generate)
        assert again.apply_chat_template(TALK, add_generation_prompt=generate) == expected
    assert again(["the tree", "a"], padding=True) == original(["the tree", "a"], padding=True)
    assert again.special_tokens_map == original.special_tokens_map
    assert again.model_max_length == original.model_max_length == 48
    assert again.get_added_vocab() == original.get_added_vocab()


def test_generation_settings_are_the_original_s(exported):
    _, again = exported
    settings = GenerationConfig.from_pretrained(again)
    assert {key: getattr(settings, key) for key in SETTINGS} == SETTINGS
    config = json.loads((again / "config.json").read_text())
    original = json.loads((exported[0] / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config.get(key) == original.get(key)


def test_what_names_code_or_other_files_is_left_out(exported):
    stored = json.loads((exported[1] / "tokenizer_config.json").read_text())
    assert not {"auto_map", "vocab_file", "name_or_path"} & stored.keys()
    assert "compilation" not in json.loads((exported[1] / "generation_config.json").read_text())
    assert not list(exported[1].glob("*.py"))


def test_the_card_names_the_original(exported):
    folder, again = exported
    card = (again / "README.md").read_text()
    assert "made of `model` by modtrain" in card and "its weights unchanged" in card
    assert str(folder) not in card and "apply_chat_template" in card
    run = PromptFormat.read(again.parent / "runs" / "imported")
    assert run.origin["files"] and all(digest in card for digest in run.origin["files"].values())
    assert "## Training" not in card


def test_a_run_of_an_earlier_version_keeps_its_tokens(exported, tmp_path):
    """Its format has no files."""
    run = tmp_path / "runs" / "imported"
    shutil.copytree(exported[1].parent / "runs" / "imported", run)
    whole = PromptFormat.read(run)
    replace(whole, files={}, origin={}).write(run)
    output = tmp_path / "out"
    moved = str(run / "data")
    export(ExportConfig("imported", str(run.parent), data_path=moved, output=str(output)))
    original, again = (AutoTokenizer.from_pretrained(path) for path in (exported[0], output))
    expected = original.apply_chat_template(TALK, add_generation_prompt=True)
    assert again.apply_chat_template(TALK, add_generation_prompt=True) == expected
    assert again("the tree")["input_ids"] == original("the tree")["input_ids"]
    assert GenerationConfig.from_pretrained(output).eos_token_id == [271, 0]
    assert "`model`" in (output / "README.md").read_text()


def test_files_of_another_tokenizer_are_left_out(exported, tmp_path):
    """A run may start with an imported model's weights, and have data of another tokenizer."""
    run = tmp_path / "runs" / "imported"
    shutil.copytree(exported[1].parent / "runs" / "imported", run)
    whole = PromptFormat.read(run)
    replace(whole, origin={**whole.origin, "tokenizer_sha256": "0" * 64}).write(run)
    output, moved = tmp_path / "out", str(run / "data")
    export(ExportConfig("imported", str(run.parent), data_path=moved, output=str(output)))
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template is None and tokenizer.eos_token == "<|endoftext|>"
    assert GenerationConfig.from_pretrained(output).eos_token_id == 0
    assert "`model`" in (output / "README.md").read_text()


def test_tokens_before_a_text_are_added_where_the_tokenizer_file_does_not(tmp_path):
    parsed = Tokenizer.from_str(chat_tokenizer().decode())
    parsed.post_processor = processors.ByteLevel()
    plain = parsed.encode("the tree").ids
    write_tokenizer(parsed.to_str().encode(), 0, 64, tmp_path, PromptFormat(begin_ids=(270,)))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("the tree")["input_ids"] == [270, *plain]


@pytest.mark.slow
def test_named_templates_are_kept(exported, tmp_path):
    folder = Path(shutil.copytree(exported[0], tmp_path / "model"))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "short.jinja").write_text("{{ messages[-1].content }}")
    again = AutoTokenizer.from_pretrained(round_trip(folder, tmp_path / "runs"))
    original = AutoTokenizer.from_pretrained(folder)
    for name in ("default", "short"):
        expected = original.apply_chat_template(TALK, chat_template=name, tokenize=False)
        assert again.apply_chat_template(TALK, chat_template=name, tokenize=False) == expected
    for number in range(40):
        (more / f"t{number}.jinja").write_text("x")
    with pytest.raises(DataError, match="more than 32 templates"):
        import_model(ImportConfig(str(folder), "other", str(tmp_path / "runs")))


@pytest.mark.parametrize("files", [{"../up.json": {}}, {"config.json": "x"}, ["config.json"]])
def test_files_that_a_tokenizer_has_not_are_refused(files, tmp_path):
    content = {"begin_ids": [], "end_ids": [], "chat_template": None, "special_tokens": {}}
    (tmp_path / "prompt_format.json").write_text(json.dumps({**content, "files": files}))
    with pytest.raises(ModtrainError, match="import the model again"):
        PromptFormat.read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("value", [-1, 10**30, "x", {}, True, [None, "x"]])
def test_a_number_that_is_no_token_is_left_out(value, exported, tmp_path):
    folder = Path(shutil.copytree(exported[0], tmp_path / "model"))
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    try:
        output = round_trip(folder, tmp_path / "runs")
    except ModtrainError as error:
        assert "model" in str(error)
    else:
        for name in ("generation_config.json", "config.json"):
            kept = json.loads((output / name).read_text()).get("eos_token_id")
            assert kept in (None, [])
