"""The Python API: its documented examples run, and importing modtrain loads nothing heavy."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn

import modtrain
from modtrain.cli.compose import compose
from modtrain.common.errors import ConfigError
from modtrain.models.block import Block
from modtrain.training.run import train

PAGE = Path(__file__).parents[1] / "docs/reference/python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch):
    """A folder with a run of the name that the page uses."""
    more = ["eval.every=null", "log=jsonl", "log.progress=false", "name=from_python"]
    train(compose("train", [*tiny, *more, f"runs_dir={tmp_path}/runs", "budget.steps=2"]))
    monkeypatch.chdir(tmp_path)


def run(example):
    names, output = {}, io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example, PAGE.name, "exec"), names)
    return names, output.getvalue()


def test_a_bare_layer_computes_its_share():
    _, output = run(EXAMPLES[0])
    assert output == "25% of the tokens were computed\n"


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_a_bare_layer_begins_with_what_it_wraps(scale):
    """Whatever the scale of its input: gates are near 1, and the router gets a gradient."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    layer = modtrain.MixtureOfDepths(block, 32, 0.5)
    x_BSD = scale * torch.randn(4, 16, 32)
    output = layer(x_BSD)
    index_BK = output.routing[0].chosen_BS.nonzero()[:, 1].view(4, 8)
    chosen_BKD = x_BSD.gather(1, index_BK.unsqueeze(2).expand(-1, -1, 32))
    update_BKD = block(chosen_BKD) - chosen_BKD
    routed_BKD = (output.value_BSD - x_BSD)[output.routing[0].chosen_BS].view(4, 8, 32)
    gate_BK = (routed_BKD * update_BKD).sum(-1) / update_BKD.square().sum(-1)
    assert gate_BK.min() > 0.9
    assert gate_BK.max() < 1.5
    output.value_BSD.square().mean().backward()
    assert layer.router.weight.grad.norm() > 0


def test_the_layer_example_learns():
    names, output = run(EXAMPLES[1])
    losses = torch.stack(names["losses"])
    assert losses[-10:].mean() < losses[:10].mean() / 2
    assert "routed 0.25" in output


def test_the_model_example_runs():
    _, output = run(EXAMPLES[2])
    assert re.fullmatch(r"loss \d\.\d\d nats per token, \d\d% of the dense model's FLOPs\n", output)


def test_the_run_example_generates(workplace):
    names, output = run(EXAMPLES[4])
    assert output.strip()
    model, tokenizer = names["model"], names["tokenizer"]
    one, two = (modtrain.generate(model, tokenizer, "a", max_tokens=5) for _ in range(2))
    assert one == two
    assert not model.training
    start = one[:1]
    assert modtrain.generate(model, tokenizer, "a", max_tokens=5, stop=[start]) == ""
    with pytest.raises(ConfigError, match="max_tokens"):
        modtrain.generate(model, tokenizer, max_tokens=0)


def test_a_document_ends_with_the_token_of_the_run(monkeypatch, tmp_path):
    from modtrain.inference import api

    class Model(torch.nn.Module):
        config = SimpleNamespace(causal_selections=["threshold"])

    class AskedError(Exception):
        pass

    def vocabulary(_content, _name, end_id):
        raise AskedError(end_id)

    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer(models.BPE()).to_str())
    loaded = SimpleNamespace(model=Model(), tokenizer=path, end_id=7)
    monkeypatch.setattr(api, "load_configured_run", lambda _: loaded)
    monkeypatch.setattr(api, "Vocabulary", vocabulary)
    model, tokenizer = modtrain.load_run(tmp_path / "run", step=1)
    with pytest.raises(AskedError, match="7"):
        modtrain.generate(model, tokenizer)
    with pytest.raises(AskedError, match="None"):
        modtrain.generate(Model(), tokenizer)


def test_every_name_is_importable_and_documented():
    assert len(EXAMPLES) == 5
    for name in modtrain.__all__:
        assert getattr(modtrain, name).__doc__
        assert f"`{name}`" in PAGE.read_text()
    assert set(modtrain.__all__) <= set(dir(modtrain))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        modtrain.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import modtrain; modtrain.ModelConfig", {"torch"}),
        ("import modtrain.data.config", {"torch", "numpy", "pyarrow", "lightning"}),
        ("import modtrain.data.stream.index", {"torch", "numpy", "pyarrow", "lightning"}),
        ("import modtrain.inference.config", {"torch"}),
        # They fork, which what torch has started does not bear.
        ("import modtrain.experiments.search.search", {"torch"}),
        ("import modtrain.experiments.sweep.sweep", {"torch"}),
    ],
)
def test_what_has_to_be_quick_loads_nothing_heavy(code, heavy):
    code += f"; import sys; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_layer_routes_plain_modules():
    """f(x) or x + f(x), with and without predictors; the chosen change and the others do not."""
    torch.manual_seed(0)
    linear, x_BSD = nn.Linear(8, 8), torch.randn(2, 16, 8)

    class WithResidual(nn.Module):
        def forward(self, x):
            return x + linear(x)

    plain = modtrain.MixtureOfDepths(linear, 8, 0.25)
    residual = modtrain.MixtureOfDepths(WithResidual(), 8, 0.25, includes_residual=True)
    residual.router, residual.predictor = plain.router, plain.predictor
    one, two = plain(x_BSD), residual(x_BSD)
    torch.testing.assert_close(one.value_BSD, two.value_BSD)
    chosen_BS = one.routing[0].chosen_BS
    assert chosen_BS.sum(1).tolist() == [4, 4]
    assert torch.equal((one.value_BSD != x_BSD).any(-1), chosen_BS)

    causal_BS = plain.eval()(x_BSD).routing[0].chosen_BS
    assert torch.equal(causal_BS, one.routing[0].predictor_BS > 0)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: modtrain.MixtureOfDepths(nn.Identity(), 8, 0.0), "capacity=0.0"),
        (
            lambda: modtrain.MixtureOfDepths(Block(nn.Identity(), nn.Identity()), 8)(
                torch.zeros(1, 4, 8)
            ),
            "Block takes a SequenceContext",
        ),
        (
            lambda: modtrain.MixtureOfDepths(
                nn.Identity(), 8, config=modtrain.RouterConfig(causal=[])
            ).eval()(torch.zeros(1, 4, 8)),
            "no causal decision",
        ),
    ],
)
def test_mistakes_are_named(build, word):
    with pytest.raises(ValueError, match=re.escape(word)):
        build()
