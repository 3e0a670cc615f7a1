"""Exported folders where modtrain is not installed."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from modtrain.checkpoint.layout import checkpoint_path
from modtrain.interop.config import ExportConfig
from modtrain.interop.export import export
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model
from tests.helpers.model_cases import random_tokens
from tests.interop.exported_models import greedy

ROOT = Path(__file__).parents[2]
PROMPT = random_tokens(1, 12).tolist()

# Arguments: folder, whether to forbid modtrain or to expect that it is missing, options as JSON.
PROGRAM = """
import importlib.util, json, sys

folder, mode, options, prompt = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
if mode == "forbid":
    class Forbidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "modtrain":
                raise ImportError("modtrain is not to be imported")
    sys.meta_path.insert(0, Forbidden())
else:
    assert importlib.util.find_spec("modtrain") is None

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
trust = options.get("trust_remote_code", False)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
ids = torch.tensor(prompt)
with torch.no_grad():
    logits = model(ids).logits
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", **options)
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits)
pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
written = pipe(["the tree", "a"], max_new_tokens=5, do_sample=False, batch_size=2)
assert [part[0]["generated_text"][:1] for part in written] == ["t", "a"]
print(json.dumps({"logits": logits.tolist(), "text": text[0, ids.shape[1]:].tolist()}))
"""


def run_program(python, folder: Path, mode: str, cwd: Path, options: dict) -> dict:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", PROGRAM, folder, mode, json.dumps(options), json.dumps(PROMPT)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(output: dict, runs: Path, name: str) -> None:
    run = RunDirectory(runs / name)
    config = run.read_config()
    model = load_model(config, checkpoint_path(run.checkpoints, 12))
    with torch.no_grad():
        logits = model(torch.tensor(PROMPT), selection=config.model.causal_selections[0])
    actual = torch.tensor(output["logits"])
    torch.testing.assert_close(actual, logits.logits_BSV, rtol=0, atol=1e-5)
    (expected,) = greedy(model, PROMPT, 16)
    end = expected.index(0) + 1 if 0 in expected else len(expected)
    assert output["text"] == expected[:end]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["routed", "dense"])
def test_a_folder_loads_in_a_process_that_cannot_import_modtrain(name, runs, tmp_path):
    folder = tmp_path / "exported"
    export(ExportConfig(run=name, runs_dir=str(runs), output=str(folder)))
    options = {"trust_remote_code": True} if name == "routed" else {}
    assert_same(run_program(sys.executable, folder, "forbid", tmp_path, options), runs, name)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_folder_loads_in_an_environment_of_its_own(runs, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [environment / "bin/pip", "--quiet", "--disable-pip-version-check", "install"]
    constraints = ["-c", ROOT / "constraints.txt"]
    packages = ["torch", "transformers", "accelerate", "jinja2"]
    subprocess.run([*pip, *constraints, *packages], check=True, cwd=tmp_path)
    for name in ("routed", "dense"):
        folder = tmp_path / name
        export(ExportConfig(run=name, runs_dir=str(runs), output=str(folder)))
        options = {"trust_remote_code": name == "routed", "device_map": "auto"}
        output = run_program(environment / "bin/python", folder, "missing", tmp_path, options)
        assert_same(output, runs, name)
