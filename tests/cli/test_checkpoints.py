"""What `modtrain checkpoints` prints and does, and the file that a checkpoint's weights make."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modtrain.checkpoint.checkpointer import Checkpointer
from modtrain.checkpoint.config import CheckpointsConfig
from modtrain.checkpoint.consolidate import consolidate
from modtrain.checkpoint.layout import Manifest, checkpoint_path
from modtrain.checkpoint.reading import TensorReader
from modtrain.checkpoint.recovery import latest, prune, whole_checkpoints, with_checkpoint
from modtrain.checkpoint.state import named_state
from modtrain.cli import checkpoints
from modtrain.cli.checkpoints import run_checkpoints
from modtrain.cli.compose import compose
from modtrain.cli.main import main
from modtrain.common import terminal
from modtrain.common.errors import CheckpointError
from modtrain.common.terminal import plain_console
from modtrain.distributed.process_group import Ranks
from modtrain.models.config import ModelConfig
from modtrain.models.transformer import Transformer
from modtrain.training.config import CheckpointConfig, TrainConfig
from modtrain.training.run_directory import RunDirectory
from modtrain.training.trained_model import load_model
from tests.helpers.problems import problems_of
from tests.helpers.ranks import on_ranks
from tests.helpers.saved import flip_bit, save_whole

MODEL = ModelConfig(
    d_model=32, num_layers=2, num_heads=2, vocab_size=61, d_ff=40, tie_embeddings=True
)
CONFIG = TrainConfig(name="r", model=MODEL, checkpoint=CheckpointConfig(keep_last=2))


def saves(root: str, *steps: int) -> None:
    """Save the model, sharded where there are several ranks."""
    ranks, run = Ranks.create(), RunDirectory(Path(root) / "r")
    model = Transformer(MODEL, seed=3)
    if ranks.world_size > 1:
        mesh = init_device_mesh("cpu", (ranks.world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Checkpointer(ranks) as checkpointer:
        for step in steps:
            optimizer.step()
            tensors, extra_state = named_state(model, optimizer)
            extra_state["progress"] = {"step": step, "tokens": step * 1000, "flops": step * 1e9}
            checkpointer.save(checkpoint_path(run.checkpoints, step), tensors, extra_state, step)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "r")
    directory.checkpoints.mkdir(parents=True)
    directory.config.write_text(OmegaConf.to_yaml(OmegaConf.structured(CONFIG)))
    return directory


def verb(run: RunDirectory, **changes) -> str:
    stream = io.StringIO()
    config = CheckpointsConfig(run="r", runs_dir=str(run.path.parent), **changes)
    run_checkpoints(config, Console(file=stream, width=200))
    return stream.getvalue()


def hurt(run: RunDirectory, step: int) -> None:
    flip_bit(checkpoint_path(run.checkpoints, step) / "__0_0.distcp")


def test_the_list_has_steps_bytes_and_progress(run):
    saves(str(run.path.parent), 1, 2)
    hurt(run, 1)
    manifest = Manifest.read(checkpoint_path(run.checkpoints, 2))
    shown = verb(run)
    for text in ("1,000", "2,000", "2e+09", f"{manifest.num_bytes:,}"):
        assert text in shown, shown
    (run.checkpoints / "step-000000001" / "state.pt").unlink()
    assert "lacks its file state.pt" in verb(run)


def test_a_name_that_disagrees_with_the_step_is_shown(run):
    saves(str(run.path.parent), 1)
    shutil.copytree(checkpoint_path(run.checkpoints, 1), run.checkpoints / "step-best")
    assert "1 (step-best)" in verb(run)


def test_checkpoints_that_cannot_be_listed_are_not_none(run):
    run.checkpoints.rmdir()
    run.checkpoints.touch()
    with pytest.raises(CheckpointError, match="cannot be listed"):
        verb(run)


def test_verify_reads_every_byte(run):
    saves(str(run.path.parent), 1, 2)
    assert verb(run, action="verify").count("yes") == 2
    hurt(run, 1)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        verb(run, action="verify")


def test_prune_keeps_what_the_run_keeps_or_what_is_asked_for(run):
    saves(str(run.path.parent), 1, 2, 3, 4)
    assert "step-000000001" in verb(run, action="prune", keep_every=2)
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [2, 3, 4]
    verb(run, action="prune", keep_last=1)
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [4]


def test_prune_keeps_the_steps_that_the_run_keeps(run):
    run.config.unlink()
    run.start(replace(CONFIG, checkpoint=CheckpointConfig(keep_last=1, keep_steps=[2])), "f", "cpu")
    saves(str(run.path.parent), 1, 2, 3, 4)
    verb(run, action="prune")
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [2, 4]


def test_prune_goes_by_the_newest_start_of_a_run(run):
    run.config.unlink()
    for keep_last in (1, 3):
        run.start(replace(CONFIG, checkpoint=CheckpointConfig(keep_last=keep_last)), "f", "cpu")
    saves(str(run.path.parent), 1, 2, 3, 4)
    verb(run, action="prune")
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [2, 3, 4]


def test_prune_keeps_another_checkpoint_in_place_of_a_damaged_one(run):
    saves(str(run.path.parent), 1, 2, 3)
    hurt(run, 3)
    verb(run, action="prune", keep_last=1)
    newest = latest(run.checkpoints)
    assert newest is not None and newest[0] == 2
    assert [s for s, _ in whole_checkpoints(run.checkpoints)] == [2, 3]


@pytest.mark.usefixtures("no_lock_wait")
def test_prune_leaves_a_run_in_use_alone(run):
    saves(str(run.path.parent), 1, 2, 3)
    with run.locked(), pytest.raises(CheckpointError, match="in use"):
        verb(run, action="prune", keep_last=1)
    assert len(whole_checkpoints(run.checkpoints)) == 3


def test_what_is_pruned_while_it_is_read_is_chosen_anew(run):
    saves(str(run.path.parent), 1, 2)
    read = []

    def use(step, path):
        read.append(step)
        if step == 2:
            prune(run.checkpoints, keep_last=1, keep_every=None)
            checkpoint_path(run.checkpoints, 2).rename(run.path / "gone")
            saves(str(run.path.parent), 3)
        return Manifest.read(path).step

    assert with_checkpoint(run.checkpoints, None, use) == 3
    assert read == [2, 3]
    with pytest.raises(CheckpointError, match="no checkpoint of step=2"):
        with_checkpoint(run.checkpoints, 2, use)
    hurt(run, 3)
    with pytest.raises(CheckpointError, match="does not match"):
        with_checkpoint(run.checkpoints, 3, use)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_consolidated_weights_are_those_of_the_checkpoint(run, world):
    root = str(run.path.parent)
    on_ranks(saves, 2, root, 5) if world == 2 else saves(root, 5)
    assert "step 5" in verb(run, action="consolidate")
    file = run.path / "model-000000005.safetensors"
    loaded = load_file(file)
    model = load_model(CONFIG, checkpoint_path(run.checkpoints, 5))
    weights = model.state_dict()
    assert loaded.keys() == weights.keys() - {"head.weight"}
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["tied"]) == {"head.weight": "embedding.weight"}
    assert metadata["step"] == "5"
    parts = {name: getattr(MODEL, name) for name in ("router", "experts", "rope_scaling")}
    assert ModelConfig(**{**json.loads(metadata["model"]), **parts}) == MODEL
    assert len(metadata["config_sha256"]) == 64


def test_consolidated_weights_in_bf16(run):
    saves(str(run.path.parent), 1)
    output = run.path / "half.safetensors"
    verb(run, action="consolidate", dtype="bf16", output=str(output), step=1)
    model = load_model(CONFIG, checkpoint_path(run.checkpoints, 1))
    weights = model.state_dict()
    for key, value in load_file(output).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights[key].bfloat16())
    with pytest.raises(CheckpointError, match="no checkpoint of step=9; there are: 1"):
        verb(run, action="consolidate", step=9)


def test_any_dtype_and_shape_is_consolidated(tmp_path):
    state = {
        "a": torch.tensor(3, dtype=torch.int64),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.zeros(0, 4),
        "d": torch.tensor([True, False, True]),
        "e": torch.randn(7),
        "f": torch.randn(3, 2, dtype=torch.float64).T,
    }
    path = checkpoint_path(tmp_path, 1)
    save_whole(path, {f"state_dict.{key}": value for key, value in state.items()}, 1)
    size = consolidate(path, tmp_path / "all.safetensors")
    loaded = load_file(tmp_path / "all.safetensors")
    assert size == (tmp_path / "all.safetensors").stat().st_size
    assert loaded.keys() == state.keys()
    assert all(v.dtype == loaded[k].dtype and torch.equal(v, loaded[k]) for k, v in state.items())


def test_a_tied_weight_that_was_stored_twice_is_stored_once(tmp_path):
    path, weight = checkpoint_path(tmp_path, 1), torch.randn(3, 2)
    names = ("state_dict.head.weight", "state_dict.embedding.weight")
    save_whole(path, dict.fromkeys(names, weight), 1)
    tied = {"head.weight": "embedding.weight"}
    consolidate(path, tmp_path / "w.safetensors", tied=tied)
    assert load_file(tmp_path / "w.safetensors").keys() == {"embedding.weight"}


def peak_of_consolidating(path: str, output: str) -> int:
    """Bytes of memory at the peak above those before, measured in a process of its own."""
    code = (
        "import sys, resource\nfrom pathlib import Path\n"
        "from modtrain.checkpoint.consolidate import consolidate\n"
        "path, output = map(Path, sys.argv[1:])\n"
        "consolidate(path.parent / 'step-000000001', output)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "consolidate(path, output)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, output], capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


@pytest.mark.nightly
def test_consolidating_holds_one_tensor_at_a_time(tmp_path):
    each = 4 * 2**20
    save_whole(checkpoint_path(tmp_path, 1), {"state_dict.w": torch.ones(3)}, 1)
    large = {f"state_dict.{n}": torch.randn(each // 4) for n in range(24)}
    path = checkpoint_path(tmp_path, 2)
    save_whole(path, large, 2)
    peak = peak_of_consolidating(str(path), str(tmp_path / "w.safetensors"))
    assert peak < 5 * each


def test_an_interrupted_consolidation_leaves_no_file(run, monkeypatch):
    saves(str(run.path.parent), 1)
    path = checkpoint_path(run.checkpoints, 1)
    reads = iter(range(3))
    read = TensorReader.read

    def breaks(self, *arguments):
        next(reads)
        return read(self, *arguments)

    monkeypatch.setattr(TensorReader, "read", breaks)
    with pytest.raises((StopIteration, RuntimeError)):
        consolidate(path, run.path / "w.safetensors")
    assert not (run.path / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "run"),
        (["run=r", "action=burn"], "action"),
        (["run=r", "dtype=fp8"], "dtype"),
        (["run=r", "keep_last=0", "action=prune"], "keep_last"),
        (["run=r", "step=3"], "step"),
        (["run=r", "action=verify", "keep_last=3"], "keep_last"),
    ],
)
def test_invalid_requests_are_reported(overrides, key):
    assert list(problems_of(run_checkpoints, compose("checkpoints", overrides))) == [key]


@contextmanager
def unread(monkeypatch):
    """Have what the verb prints go to a pipe that its reader has closed."""

    class Closed(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(terminal, "stop_printing", lambda: None)
        patch.setattr(checkpoints, "plain_console", lambda **_: plain_console(file=Closed()))
        yield


def test_the_command_reports_and_fails(run, capsys, monkeypatch):
    saves(str(run.path.parent), 1)
    asked = ["checkpoints", f"runs_dir={run.path.parent}"]
    assert main([*asked, "run=r"]) == 0
    assert "1,000" in capsys.readouterr().out
    with unread(monkeypatch):
        for action in ("list", "prune", "consolidate"):
            assert main([*asked, "run=r", f"action={action}"]) == 0, action
    hurt(run, 1)
    with unread(monkeypatch):
        # A reader that has closed the pipe hides no damage.
        assert main([*asked, "run=r", "action=verify"]) == 1
        assert "damaged checkpoints:" in capsys.readouterr().err
    assert main([*asked, "run=r", "action=verify"]) == 1
    assert "damaged checkpoints:" in capsys.readouterr().err
    assert main([*asked, "run=gone"]) == 1
    assert "there is no run" in capsys.readouterr().err
