"""Exported folders in other programs: transformers' pipeline, its server, and litgpt."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.cli.compose import compose
from modtrain.inference.token_text import Vocabulary
from modtrain.interop.config import ExportConfig
from modtrain.interop.export import export
from modtrain.training.run import train
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model
from tests.interop.environments import make_environment
from tests.interop.exported_models import greedy
from tests.interop.test_round_trip import make_chat_folder, round_trip

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

PROMPTS = ["the quiet river", "a", "under the old tree", "stone and", *(f"the {n}" for n in "abcd")]
COUNT = 12

# Arguments: address, model, prompts as JSON, tokens. Prints the texts, streamed by 8 threads.
CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI

address, model, prompts, count = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
client = OpenAI(base_url=address + "/v1", api_key="none")

def complete(prompt):
    parts = client.completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0.0, stream=True
    )
    return [part.choices[0].text for part in parts if part.choices]

def answer(prompt):
    messages = [{"role": "user", "content": prompt}]
    parts = client.chat.completions.create(
        model=model, messages=messages, max_tokens=count, temperature=0.0, stream=True
    )
    return [part.choices[0].delta.content or "" for part in parts if part.choices]

with ThreadPoolExecutor(8) as threads:
    texts = list(threads.map(complete if sys.argv[5] == "complete" else answer, prompts))
print(json.dumps(texts))
"""

# The server looks a model's class up by its name among transformers' own, which one with its code
# beside the weights is not.
SERVER = """
import transformers
from transformers.cli.transformers import main

transformers.ModtrainForCausalLM = transformers.AutoModelForCausalLM
main()
"""

# Arguments: folder, prompts as JSON, tokens. Converts the folder, and prints tokens by prompt.
LITGPT = """
import json, sys
from pathlib import Path

from litgpt import LLM
from litgpt.config import name_to_config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

folder, prompts, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
theirs = json.loads((folder / "config.json").read_text())
name = "qwen3-mine" if theirs["model_type"] == "qwen3" else "mine"
name_to_config[name] = {
    "name": name,
    "hf_config": {},
    "block_size": theirs["max_position_embeddings"],
    "vocab_size": theirs["vocab_size"],
    "padded_vocab_size": theirs["vocab_size"],
    "n_layer": theirs["num_hidden_layers"],
    "n_head": theirs["num_attention_heads"],
    "n_query_groups": theirs["num_key_value_heads"],
    "n_embd": theirs["hidden_size"],
    "head_size": theirs["head_dim"],
    "intermediate_size": theirs["intermediate_size"],
    "rope_base": theirs["rope_parameters"]["rope_theta"],
    "norm_eps": theirs["rms_norm_eps"],
    "norm_qk": theirs["model_type"] == "qwen3",
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
convert_hf_checkpoint(folder, model_name=name)
model = LLM.load(str(folder), distribute=None)
# Without a precision it computes in bfloat16.
model.distribute(accelerator="cpu", devices=1, precision="32-true")
tokens = [
    model.generate(
        prompt, max_new_tokens=count, temperature=0.0, top_k=1, return_as_token_ids=True
    ).tolist()
    for prompt in prompts
]
print(json.dumps(tokens))
"""


@pytest.fixture(scope="module")
def folders(runs, tiny, tmp_path_factory):
    """A routed run, a dense one and one with normalised queries, exported."""
    words = ["log=jsonl", "log.progress=false", f"runs_dir={runs}", "name=qk_norm"]
    train(compose("train", [*tiny, *words, "model.pattern=dense", "model.qk_norm=true"]))
    root = tmp_path_factory.mktemp("folders")
    for name in ("routed", "dense", "qk_norm"):
        export(ExportConfig(run=name, runs_dir=str(runs), output=str(root / name)))
    return root


def own_tokens(runs: Path, name: str) -> tuple[list[list[int]], Tokenizer]:
    """What modtrain continues the prompts with, to the end of a document."""
    run = RunDirectory(runs / name)
    trained = run.read_config()
    model = load_model(trained, checkpoint_path(run.checkpoints, 12))
    vocabulary = Vocabulary(trained.data.tokenizer_path.read_bytes(), "the tokenizer")
    texts = greedy(model, [vocabulary.encode(prompt) for prompt in PROMPTS], COUNT)
    end = vocabulary.end_id
    return [t[: t.index(end)] if end in t else t for t in texts], vocabulary.tokenizer


def whole(texts: Iterable[str]) -> list[str]:
    """Leave out a character that the last token began: a stream waits for its other bytes."""
    return [text.rstrip("\ufffd") for text in texts]


def joined(streamed: list[list[str]]) -> list[str]:
    return whole("".join(parts) for parts in streamed)


def environment_of(folder: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return own | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_in(python: Path | str, folder: Path, program: str, *arguments: str):
    done = subprocess.run(
        [python, "-c", program, *arguments],
        cwd=folder,
        env=environment_of(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["routed", "dense"])
def test_a_pipeline_writes_the_text_of_modtrain(name, folders, runs):
    expected, tokenizer = own_tokens(runs, name)
    pipe = pipeline("text-generation", model=str(folders / name), trust_remote_code=True)
    for batch_size in (1, 4):
        written = pipe(
            PROMPTS,
            max_new_tokens=COUNT,
            do_sample=False,
            batch_size=batch_size,
            return_full_text=False,
        )
        texts = [part[0]["generated_text"] for part in written]
        assert texts == [tokenizer.decode(ids) for ids in expected]


@pytest.fixture(scope="module")
def server_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    return make_environment(folder / "environment", "transformers[serving]", "openai")


@contextmanager
def serving(python: Path, model: Path, tmp_path: Path):
    """Run `transformers serve` of a folder; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-c", SERVER, "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--trust-remote-code"],
            cwd=tmp_path,
            env=environment_of(tmp_path),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("name", ["routed", "dense"])
def test_a_server_streams_to_eight_clients_at_once(name, folders, runs, server_python, tmp_path):
    expected, tokenizer = own_tokens(runs, name)
    model = folders / name
    with serving(server_python, model, tmp_path) as address:
        arguments = (address, str(model), json.dumps(PROMPTS), str(COUNT), "complete")
        streamed = run_in(server_python, tmp_path, CLIENT, *arguments)
    assert joined(streamed) == whole(tokenizer.decode(ids) for ids in expected)
    assert any(len([part for part in parts if part]) > 1 for parts in streamed)


def test_a_server_answers_by_an_imported_model_s_template(server_python, tmp_path):
    folder = round_trip(make_chat_folder(tmp_path / "model"), tmp_path / "runs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in PROMPTS[:3]:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=COUNT, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(answer, skip_special_tokens=True))
    with serving(server_python, folder, tmp_path) as address:
        arguments = (address, str(folder), json.dumps(PROMPTS[:3]), str(COUNT), "answer")
        streamed = run_in(server_python, tmp_path, CLIENT, *arguments)
    assert joined(streamed) == whole(expected)


@pytest.fixture(scope="module")
def litgpt_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litgpt")
    # It needs another huggingface_hub than transformers 5 does.
    packages = ("litgpt==0.5.13", "transformers>=4.51,<5")
    return make_environment(folder / "environment", *packages, constrained=False)


@pytest.mark.parametrize("name", ["dense", "qk_norm"])
def test_litgpt_writes_the_text_of_modtrain(name, folders, runs, litgpt_python, tmp_path):
    expected, tokenizer = own_tokens(runs, name)
    arguments = (str(folders / name), json.dumps(PROMPTS), str(COUNT))
    written = run_in(litgpt_python, tmp_path, LITGPT, *arguments)
    for prompt, ids, own in zip(PROMPTS, written, expected, strict=True):
        assert ids[: len(own)] == own, (prompt, tokenizer.decode(ids))
