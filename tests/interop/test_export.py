"""`modtrain export`: the folder, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.cli.compose import compose
from modtrain.cli.main import main
from modtrain.common.errors import DataError
from modtrain.data.mixture.config import SourceConfig
from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.data.stream.index_json import read_summary
from modtrain.inference.token_text import Vocabulary
from modtrain.interop import config as export_config
from modtrain.interop.config import ExportConfig
from modtrain.interop.export import export
from modtrain.interop.folder import write_model, write_tokenizer
from modtrain.interop.model_card import model_card
from modtrain.training.run_directory import RunDirectory, dotted_values
from modtrain.training.trained_model import load_model
from tests.helpers.model_cases import random_tokens
from tests.helpers.problems import problems_of
from tests.interop.exported_models import exported, greedy


def request(runs: Path, output: Path, name: str = "routed", **changes) -> ExportConfig:
    return ExportConfig(run=name, runs_dir=str(runs), output=str(output), **changes)


def trained_model(runs: Path, name: str, step: int = 12):
    run = RunDirectory(runs / name)
    return load_model(run.read_config(), checkpoint_path(run.checkpoints, step))


def card_of(output: Path) -> str:
    return (output / "README.md").read_text()


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "routed"
    export(request(runs, output))
    return output


def test_a_dense_run_becomes_a_plain_llama(runs, tmp_path, capsys):
    output = tmp_path / "new" / "dense"
    words = ["export", "run=dense", f"runs_dir={runs}", f"output={output}", "max_shard_size=50KB"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {output}: step 12 of dense as llama,")
    assert "trust_remote_code" not in printed + card_of(output)
    assert not list(output.glob("*.py")) and len(list(output.glob("model-*.safetensors"))) > 1
    stored = json.loads((output / "config.json").read_text())
    assert stored["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in stored
    assert stored["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    theirs, ours = AutoModelForCausalLM.from_pretrained(output), trained_model(runs, "dense")
    tokens_BS = random_tokens(2, 30)
    with torch.no_grad():
        expected = ours(tokens_BS, selection="causal").logits_BSV
        torch.testing.assert_close(theirs(tokens_BS).logits, expected, rtol=0, atol=1e-5)


def test_a_routed_run_comes_with_its_code(folder, runs):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("configuration_modtrain.py", "modeling_modtrain.py"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    stored = json.loads((folder / "config.json").read_text())
    assert stored["auto_map"] == {
        "AutoConfig": "configuration_modtrain.ModtrainConfig",
        "AutoModel": "modeling_modtrain.ModtrainModel",
        "AutoModelForCausalLM": "modeling_modtrain.ModtrainForCausalLM",
    }
    assert "import modtrain" not in (folder / "modeling_modtrain.py").read_text()
    assert "from modtrain" not in (folder / "modeling_modtrain.py").read_text()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "README.md").stat().st_mode & 0o777
    }
    end = json.loads((folder / "generation_config.json").read_text())
    assert end["eos_token_id"] == end["bos_token_id"] == end["pad_token_id"]
    assert [path.name for path in folder.parent.iterdir()] == ["routed"]


def test_prompts_have_the_tokens_that_modtrain_gives_them(folder, runs, prepared):
    vocabulary = Vocabulary((prepared / "tokenizer.json").read_bytes(), "the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.eos_token_id == vocabulary.end_id
    assert tokenizer.padding_side == "left"
    for text in ("the quiet river", " walks\n\nunder ", "é and 木"):
        batch = tokenizer(text)
        assert batch["input_ids"] == vocabulary.encode(text)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(batch["input_ids"]) == text


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "mod"])
def test_the_tokenizer_stays_its_own_beside_every_architecture(name, tmp_path, prepared):
    content = (prepared / "tokenizer.json").read_bytes()
    vocabulary = Vocabulary(content, "the tokenizer")
    write_model(exported(name).theirs, tmp_path, "5GB")
    write_tokenizer(content, vocabulary.end_id, 64, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for text in ("the quiet river", " walks\n\nunder 12345 ", "é and 木"):
        assert tokenizer(text)["input_ids"] == vocabulary.encode(text)
        assert tokenizer.decode(vocabulary.encode(text)) == text


def test_special_tokens_that_training_had_not_are_not_added(tmp_path):
    tokenizer = Tokenizer.from_str(train_tokenizer(["the tree and the river"] * 4, 270).decode())
    end_id = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end_id)]
    )
    tokenizer.enable_truncation(2)
    write_tokenizer(tokenizer.to_str().encode(), end_id, 64, tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("the tree and the river")["input_ids"]
    assert ids[0] != end_id and len(ids) > 2


def test_an_earlier_step_is_exported(runs, tmp_path):
    output = tmp_path / "early"
    assert "step 8 of dense" in export(request(runs, output, "dense", step=8))
    theirs, ours = AutoModelForCausalLM.from_pretrained(output), trained_model(runs, "dense", 8)
    assert torch.equal(theirs.lm_head.weight, ours.head.weight)
    card = card_of(output)
    assert "| steps | 8 of 12 |" in card
    assert "Step 8 has not been evaluated" in card


def test_nothing_is_overwritten(runs, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    for output in (full, full / "mine"):
        assert list(problems_of(export, request(runs, output))) == ["output"]
    link = tmp_path / "link"
    link.symlink_to(full)
    assert list(problems_of(export, request(runs, link))) == ["output"]
    empty = tmp_path / "empty"
    empty.mkdir()
    export(request(runs, empty, "dense"))
    assert (empty / "config.json").is_file()


def test_a_folder_that_is_filled_meanwhile_is_kept(runs, tmp_path, monkeypatch):
    output = tmp_path / "taken"

    def fill(*_):
        output.mkdir()
        (output / "mine").write_text("")
        return "card"

    monkeypatch.setattr("modtrain.interop.export.model_card", fill)
    assert list(problems_of(export, request(runs, output, "dense"))) == ["output"]
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]


def test_an_error_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modtrain.interop.export.model_card", fail)
    with pytest.raises(OSError, match="No space"):
        export(request(runs, tmp_path / "failed", "dense"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", [None, "4.57.1"])
def test_a_missing_or_old_package_is_named_with_the_remedy(version, monkeypatch):
    def installed(name):
        if version is None:
            raise export_config.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(export_config.metadata, "version", installed)
    (problem,) = problems_of(export, ExportConfig(run="a", output="b")).values()
    assert "transformers" in problem.reason and "modtrain[hf]" in problem.remedy


def test_a_wrong_request_is_refused_whole():
    keys = problems_of(export, ExportConfig(max_shard_size="big"))
    assert keys.keys() == {"run", "output", "max_shard_size"}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model.router.causal", ["model.router.causal=[]"]),
        (
            "model.router.score",
            ["model.router.score=oracle_norm", "model.router.gate=raw"],
        ),
    ],
)
def test_a_model_that_cannot_decide_causally_is_refused(key, changes, runs, tiny, tmp_path):
    config = compose("train", [*tiny, "name=undecided", f"runs_dir={tmp_path}", *changes])
    run = RunDirectory.of(config)
    run.start(config, "f" * 64, "cpu")
    assert list(problems_of(export, request(tmp_path, tmp_path / "out", "undecided"))) == [key]


def test_another_tokenizer_than_the_datas_is_refused(runs, prepared, tmp_path):
    other = tmp_path / "prepared"
    shutil.copytree(prepared, other)
    shutil.copytree(runs / "dense", tmp_path / "runs" / "dense")
    stored = tmp_path / "runs/dense/config.yaml"
    stored.write_text(stored.read_text().replace(str(prepared), str(other)))
    (other / "tokenizer.json").write_bytes(train_tokenizer(["the tree"], 270))
    with pytest.raises(DataError, match="is not the tokenizer"):
        export(request(tmp_path / "runs", tmp_path / "out", "dense"))
    assert not (tmp_path / "out").exists()


def test_the_card_has_the_losses_of_training_until_there_is_an_evaluation(runs, folder, tmp_path):
    shutil.copytree(runs / "routed", tmp_path / "runs" / "routed")
    result = RunDirectory(runs / "routed").read_result()
    for name in ("predictor", "auxiliary", "threshold"):
        loss, flops = (
            result[f"held_out/causal_{kind}_{name}"] for kind in ("loss", "flops_per_token")
        )
        assert f"| {name} | {loss:.4f} | {flops:,.0f} |" in card_of(folder)
    # A loss that is no number is null in JSON.
    evaluated = {
        "decisions": {
            "predictor": {"loss": 1.25, "flops": 4321.0},
            "threshold": {"loss": None, "flops": 4321.0},
        }
    }
    swept = {"points": [{"capacity": c, "loss": 3 * c or None, "flops": 99.0} for c in (0.5, 0)]}
    for kind, content in (("eval", evaluated), ("sweep", swept)):
        path = tmp_path / "runs" / "routed" / f"{kind}-000000012.json"
        path.write_text(json.dumps(content))
    export(request(tmp_path / "runs", tmp_path / "out"))
    card = card_of(tmp_path / "out")
    assert "| predictor | 1.2500 | 4,321 |" in card and "| auxiliary |" not in card
    assert "| threshold | nan | 4,321 |" in card
    assert "| 0.5 | 1.5000 | 99 |\n| 0 | nan | 99 |" in card


def test_the_cards_configuration_trains_the_same_run(runs, folder, prepared, tmp_path):
    card = card_of(folder)
    front, _, rest = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["tags"] == ["modtrain", "mixture-of-depths"]
    own = tmp_path / "mine" / "experiment"
    own.mkdir(parents=True)
    (own / "routed.yaml").write_text(rest.partition("```yaml\n")[2].partition("```")[0])
    words = ["experiment=routed", "name=routed", f"data.path={prepared}"]
    again = dotted_values(compose("train", words, str(own.parent)))
    trained = dotted_values(RunDirectory(runs / "routed").read_config())
    mutable = ("runs_dir", "log.", "checkpoint.", "eval.", "strategy.", "spike.", "data.")
    differing = {key for key in trained if again[key] != trained[key]}
    assert {key for key in differing if not key.startswith(mutable)} == set()
    assert str(prepared) not in card and str(runs) not in card
    assert RunDirectory(runs / "routed").read_manifest()["data_fingerprint"] in card


def test_the_card_of_a_mixture_trains_the_same_run(runs, prepared, tmp_path):
    run = RunDirectory(runs / "routed")
    trained = run.read_config()
    sources = {"web": SourceConfig(str(prepared)), "code": SourceConfig(str(prepared), 3.0)}
    mixed = replace(trained, data=replace(trained.data, path="", sources=sources))
    card = model_card(run, mixed, 12, read_summary(prepared))
    own = tmp_path / "mine" / "experiment"
    own.mkdir(parents=True)
    (own / "routed.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    command = card.partition("modtrain train --config-dir mine ")[2].partition("\n")[0]
    again = compose("train", command.split(), str(own.parent))
    assert again.problems() == []
    places = {name: replace(source, path="PREPARED") for name, source in sources.items()}
    assert again.data == replace(mixed.data, sources=places)
    assert str(prepared) not in card


def test_greedy_text_of_a_run(folder, runs):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens_BS = random_tokens(1, 12)
    # Without an end token transformers would take the token that pads for padding.
    options = {"attention_mask": torch.ones_like(tokens_BS), "eos_token_id": None}
    text = model.generate(tokens_BS, max_new_tokens=16, do_sample=False, **options)
    expected = greedy(trained_model(runs, "routed"), tokens_BS.tolist(), 16)
    assert text[:, 12:].tolist() == expected


def test_documents_were_masked_in_training_and_are_not_here(runs, prepared):
    """One document in a text is computed as in training, a later one is not; the card says so."""
    run = RunDirectory(runs / "dense")
    trained = run.read_config()
    masked = replace(trained, data=replace(trained.data, document_mask=True, eos_id=0))
    summary = read_summary(prepared)
    assert "has no such mask" in model_card(run, masked, 12, summary)
    assert "has no such mask" not in model_card(run, trained, 12, summary)
    ours, theirs = exported("llama")
    tokens_BS = random_tokens(1, 16)
    documents_BS = (torch.arange(16) >= 8).long()[None]
    with torch.no_grad():
        expected = ours(tokens_BS, documents_BS=documents_BS).logits_BSV
        actual = theirs(tokens_BS).logits
        alone = theirs(tokens_BS[:, 8:]).logits
    torch.testing.assert_close(actual[:, :8], expected[:, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, expected[:, 8:], rtol=0, atol=1e-5)
    assert not torch.allclose(actual[:, 8:], expected[:, 8:], rtol=0, atol=1e-3)
