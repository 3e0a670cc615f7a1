"""`modtrain import`: transformers' models as runs, and what is refused."""

import json
import shutil
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.common.errors import DataError, ModtrainError
from modtrain.data.prepare.tokenizer import train_tokenizer
from modtrain.inference.config import TrainedRunConfig
from modtrain.inference.loading import load_run
from modtrain.inference.token_text import Vocabulary
from modtrain.interop import gguf_file
from modtrain.interop.config import ExportConfig, ImportConfig
from modtrain.interop.export import export
from modtrain.interop.gguf_file import open_gguf
from modtrain.interop.import_model import import_model
from modtrain.interop.imported_config import model_config, parse_config
from modtrain.interop.names import tensor_shapes
from modtrain.interop.prompt_format import PromptFormat
from modtrain.models.flops import parameters
from modtrain.models.transformer import Transformer
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model, with_found_data
from tests.helpers.model_cases import random_tokens
from tests.helpers.problems import problems_of
from tests.interop.model_folders import FAMILIES, SMALL, TEMPLATE, YARN, make_folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the tree and the river"] * 4, 270)


def request(folder: Path, runs: Path, **changes) -> ImportConfig:
    return ImportConfig(
        source=str(folder), **({"name": "imported", "runs_dir": str(runs)} | changes)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    return make_folder(tmp_path_factory.mktemp("llama"), FAMILIES["llama"], tokenizer)


@pytest.fixture
def folder(llama, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors_of(folder: Path) -> dict:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_computes_what_transformers_computes_and_returns_unchanged(
    name, tmp_path, tokenizer
):
    folder = make_folder(tmp_path / "model", FAMILIES[name], tokenizer)
    import_model(request(folder, tmp_path / "runs"))
    run = RunDirectory(tmp_path / "runs" / "imported")
    trained = run.read_config()
    ours = load_model(trained, checkpoint_path(run.checkpoints, 0))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens_BS = random_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens_BS).logits
        actual = ours(tokens_BS, selection="causal").logits_BSV
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)
    assert parameters(trained.model).total == theirs.num_parameters()

    export(ExportConfig("imported", str(tmp_path / "runs"), output=str(tmp_path / "out")))
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens_BS).logits, expected, rtol=0, atol=1e-5 * scale)
    assert again.config.max_position_embeddings == 64


def test_the_run_has_its_tokenizer_and_names_its_origin(llama, tmp_path, tokenizer):
    line = import_model(request(llama, tmp_path))
    run = RunDirectory(tmp_path / "imported")
    assert line.startswith(f"wrote {run.path}: llama,")
    trained, manifest = run.read_config(), run.read_manifest()
    assert with_found_data(run, trained).data.summary().eos_id == 0
    assert Path(trained.data.path, "tokenizer.json").read_bytes() == tokenizer
    files = manifest["imported"]["files"]
    assert "config.json" in files and len(files) > 2
    assert all(len(sha256) == 64 for sha256 in files.values())
    assert PromptFormat.read(run.path).chat_template == TEMPLATE
    assert PromptFormat.read(run.path).end_ids == (0,)
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def test_a_moved_run_finds_its_tokenizer(llama, tmp_path):
    import_model(request(llama, tmp_path / "runs"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    run = RunDirectory(tmp_path / "moved" / "imported")
    trained = with_found_data(run, run.read_config(), str(tmp_path / "other"))
    assert trained.data.path == str(run.own_data)


def test_an_evaluation_without_text_names_the_key(llama, tmp_path):
    import_model(request(llama, tmp_path))
    loaded = load_run(TrainedRunConfig("imported", str(tmp_path), accelerator="cpu"))
    problem = problems_of(lambda: loaded.held_out_parts(None, 1))["data_path"]
    assert "tokenizer.path=" in problem.remedy


def test_the_end_token_is_the_one_that_the_model_declares(folder, tmp_path, tokenizer):
    own = tokenizer.replace(b"<|endoftext|>", b"<|finished|>")
    (folder / "tokenizer.json").write_bytes(own)
    import_model(request(folder, tmp_path))
    run = RunDirectory(tmp_path / "imported")
    assert with_found_data(run, run.read_config()).data.summary().eos_id == 0
    assert Vocabulary(own, "here", 0).end_id == 0
    edit_config(folder, eos_token_id=None)
    with pytest.raises(DataError, match="as eos_token_id in"):
        import_model(request(folder, tmp_path, name="other"))


def test_a_chat_template_makes_the_prompt(llama, tmp_path, tokenizer):
    import_model(request(llama, tmp_path))
    parsed = Tokenizer.from_str(tokenizer.decode())
    ids = PromptFormat.read(tmp_path / "imported").chat_ids(parsed, "the tree")
    assert ids[ids.index(0) :] == [0, *parsed.encode("<|assistant|>").ids]
    assert parsed.decode(ids) == "<|user|>the tree<|assistant|>"


def test_a_prompt_is_whole_where_the_tokenizer_stores_a_truncation(folder, tmp_path, tokenizer):
    parsed = Tokenizer.from_str(tokenizer.decode())
    parsed.enable_truncation(4)
    parsed.enable_padding(length=8, pad_id=1)
    (folder / "tokenizer.json").write_text(parsed.to_str())
    import_model(request(folder, tmp_path))
    prompt_format = PromptFormat.read(tmp_path / "imported")
    assert prompt_format.begin_ids == ()
    content = (tmp_path / "imported" / "data" / "tokenizer.json").read_bytes()
    vocabulary = Vocabulary(content, "here")
    ids = prompt_format.chat_ids(vocabulary.tokenizer, "the tree")
    assert vocabulary.tokenizer.decode(ids) == "<|user|>the tree<|assistant|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_known_without_the_model(name):
    model, problems = model_config(parse_config(SMALL | FAMILIES[name], "here"))
    assert not problems
    weights = Transformer(model).state_dict()
    if model.tie_embeddings:
        del weights["head.weight"]
    assert tensor_shapes(model) == {key: tuple(value.shape) for key, value in weights.items()}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("rope_parameters.rope_type", {"rope_parameters": YARN | {"rope_type": "dynamic"}}),
        ("rope_parameters.mscale", {"rope_parameters": YARN | {"mscale": 0.7}}),
        (
            "rope_parameters.partial_rotary_factor",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ),
    ],
)
def test_what_cannot_be_represented_is_named(key, changes, folder, tmp_path):
    edit_config(folder, **changes)
    assert list(problems_of(import_model, request(folder, tmp_path))) == [key]
    assert not (tmp_path / "imported").exists()


def test_windows_of_some_layers_are_named(tmp_path):
    values = SMALL | FAMILIES["qwen2 in a window"] | {"max_window_layers": 1}
    _, (problem,) = model_config(parse_config(values, "here"))
    assert problem.key == "layer_types"


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "num_labels", "hidden_size", "num_attention_heads", "vocab_size"],
)
def test_a_size_is_bounded_before_anything_is_made_of_it(key):
    tracemalloc.start()
    try:
        model_config(parse_config(SMALL | {"model_type": "qwen2", key: 10**12}, "here"))
    except DataError as error:
        assert f"here: its configuration is damaged:\n  {key}=1000000000000 " in str(error)
    else:
        assert key == "num_labels"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**22


@pytest.mark.parametrize("value", ["abc", "4", -1, 0, 1e999, 1.5, [], {}, [1], None, True])
@pytest.mark.parametrize("name", ["qwen2 in a window", "qwen3", "llama 3"])
def test_a_wrong_value_is_no_traceback(name, value):
    values = SMALL | FAMILIES[name]
    values |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "layer_types": None}
    rope = values.get("rope_parameters", {"rope_theta": 1.0})
    damaged = [values | {key: value} for key in values]
    damaged += [values | {"rope_parameters": rope | {key: value}} for key in [*rope, "truncate"]]
    damaged += [values | {key: value} for key in ("rope_theta", "rope_scaling", "rope_parameters")]
    for content in damaged:
        try:
            model, _ = model_config(parse_config(content, "here"))
        except ModtrainError as error:
            assert "here" in str(error)
        else:
            model.problems()


def _other_family(folder: Path) -> None:
    edit_config(folder, model_type="gemma2")


def _huge(folder: Path) -> None:
    edit_config(folder, hidden_size=2**20, intermediate_size=2**22, head_dim=2**18)


def _pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../a.safetensors"}}'
    )


def _damaged(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def _cut(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def _shards(folder: Path) -> Path:
    return next(p for p in folder.glob("*.safetensors") if "model.norm.weight" in load_file(p))


def _not_finite(folder: Path) -> None:
    weights = load_file(_shards(folder))
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, _shards(folder))


def _missing(folder: Path) -> None:
    path = _shards(folder)
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_other_family, "model_type='gemma2' cannot be imported"),
        (_huge, "model.embed_tokens.weight: is (300, 16), not (300, 1048576)"),
        (_pickle, "pytorch_model.bin is a pickle"),
        (_outside, "does not name files of the folder"),
        (_damaged, "is not a safetensors file"),
        (_cut, "is not a safetensors file"),
        (_not_finite, "model.norm.weight has values that are not finite"),
        (_missing, "model.norm.weight: is missing"),
        (_no_tokenizer, "has no tokenizer.json"),
    ],
)
def test_a_hostile_or_damaged_folder_is_refused(damage, message, folder, tmp_path):
    damage(folder)
    with pytest.raises(DataError) as raised:
        import_model(request(folder, tmp_path / "runs"))
    assert message in str(raised.value)
    assert not list(tmp_path.glob("runs/*"))


def test_a_wrong_request_is_refused_whole(llama, tmp_path):
    assert problems_of(import_model, ImportConfig()).keys() == {"source", "name"}
    import_model(request(llama, tmp_path))
    assert problems_of(import_model, request(llama, tmp_path)).keys() == {"name"}
    wrong = request(tmp_path / "none", tmp_path, name="../up", tokenizer="none", seq_len=0)
    assert problems_of(import_model, wrong).keys() == {"source", "name", "tokenizer", "seq_len"}


def test_a_damaged_prompt_format_is_reported(tmp_path):
    (tmp_path / "prompt_format.json").write_text('{"begin_ids": [-1], "end_ids": []}')
    with pytest.raises(ModtrainError, match="import the model again"):
        PromptFormat.read(tmp_path)


def _gguf_weight(name: str, weight, heads: dict) -> np.ndarray:
    """The weight as llama.cpp stores it: a rotated pair's rows are neighbours in a Llama."""
    for ending, count in heads.items():
        if name.endswith(ending):
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)
    return weight.numpy()


def make_gguf(path: Path, folder: Path, family: str) -> Path:
    """The folder's model as a GGUF file, without its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, family)
    for key, name in gguf_file.KEYS.items():
        value = config[name]
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family}.{key}", value)
    writer.add_float32(f"{family}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    writer.add_string("tokenizer.chat_template", TEMPLATE)
    theirs = {other: name for name, other in gguf_file.IN_LAYER.items()}
    outside = {other: name for name, other in gguf_file.OUTSIDE_LAYERS.items()}
    heads = {"q_proj.weight": 4, "k_proj.weight": 2} if family == "llama" else {}
    for name, weight in tensors_of(folder).items():
        stored = outside.get(name)
        if stored is None:
            _, _, layer, *place, kind = name.split(".")
            stored = f"blk.{layer}.{theirs['.'.join(place)]}.{kind}"
        writer.add_tensor(stored, _gguf_weight(name, weight, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_tensors_of_the_folder_that_it_was_made_of(
    family, tmp_path, tokenizer
):
    values = {"model_type": family, "head_dim": 4}
    folder = make_folder(tmp_path / "model", values, tokenizer)
    path = make_gguf(tmp_path / "model.gguf", folder, family)
    own = str(folder / "tokenizer.json")
    import_model(request(path, tmp_path / "runs", tokenizer=own))
    import_model(request(folder, tmp_path / "runs", name="of_folder"))
    models = []
    for name in ("imported", "of_folder"):
        run = RunDirectory(tmp_path / "runs" / name)
        models.append(load_model(run.read_config(), checkpoint_path(run.checkpoints, 0)))
    assert models[0].config.rope_theta == models[1].config.rope_theta
    assert models[0].config.norm_eps == pytest.approx(models[1].config.norm_eps)
    ours, expected = (model.state_dict() for model in models)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    content = path.read_bytes()
    for damaged, message in (
        (content[:200], "is not a whole GGUF file"),
        (content[:-64], "is not a whole GGUF file"),
        (b"GGML" + content[4:], "is not a GGUF file"),
        (content[:16] + b"\xff" * 8 + content[24:], "tensors or entries"),
        (content[:24] + b"\xff" * 7 + b"\x7f" + content[32:], "header of more than"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            import_model(request(path, tmp_path / "runs", name="damaged", tokenizer=own))


HEADER = {
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 64,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
}


def open_header(path: Path, entries: dict, tensor: str = "output_norm.weight"):
    """What is read of a GGUF file with these entries and a tensor; None leaves an entry out."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in entries.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    writer.add_tensor(tensor, np.zeros((1, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", None),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [4, 4]),
        ("llama.block_count", 20_000_000),
        ("llama.attention.layer_norm_rms_epsilon", "x"),
        ("llama.rope.freq_base", "x"),
        ("llama.rope.scaling.type", 1),
        ("llama.rope.dimension_count", 0),
        ("tokenizer.ggml.token_type", None),
        ("tokenizer.ggml.token_type", [1, 1]),
        ("tokenizer.ggml.merges", None),
        ("tokenizer.ggml.merges", ["a c"]),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.chat_template", 1),
        ("tokenizer.chat_template", "x" * 2**20),
    ],
)
def test_a_wrong_entry_of_a_gguf_file_is_named(key, value, tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(DataError) as raised:
        open_header(path, HEADER | {key: value})
    assert str(raised.value).startswith(f"{path}: {key} ")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"scaling.factor": 1.0}, {"rope_type": "default"}),
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"scaling.factor": 4.0, "scaling.type": "yarn", "scaling.original_context_length": 8},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        ),
    ],
)
def test_scaled_positions_of_a_gguf_file(entries, expected, tmp_path):
    named = {f"llama.rope.{key}": value for key, value in entries.items()}
    source = open_header(tmp_path / "model.gguf", HEADER | named)
    assert source.config["rope_parameters"] == {"rope_theta": 10000.0} | expected
    assert source.config["num_key_value_heads"] == 4


def test_a_tensor_of_another_part_of_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the tensor v\.blk\.0\.attn_q\.weight is not represented"):
        open_header(tmp_path / "model.gguf", HEADER, "v.blk.0.attn_q.weight")


def test_a_kind_of_weights_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    source = open_header(tmp_path / "model.gguf", HEADER)

    def refuse(*_):
        raise NotImplementedError("no such kind")

    monkeypatch.setattr("modtrain.interop.gguf_file.dequantize", refuse)
    with pytest.raises(DataError, match=r"output_norm.weight of type Q4_0 cannot be read"):
        source.read("model.norm.weight")


@pytest.mark.parametrize(
    "template", [1, ["{{ x }}" * 10, {"name": "default", "template": 1}], "é" * 2**17]
)
def test_a_chat_template_that_is_none_is_refused(template, folder, tmp_path):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": template}))
    with pytest.raises(DataError, match=r"tokenizer_config.json: chat_template is"):
        import_model(request(folder, tmp_path / "runs"))
    assert not list(tmp_path.glob("runs/*"))
