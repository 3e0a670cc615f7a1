"""What is said where one process starts and several were meant."""

import shlex

import pytest

from modtrain.cli.compose import compose
from modtrain.distributed.launch import Launch
from modtrain.parallel.config import PRESETS, StrategyConfig
from modtrain.training.one_process import one_process_note
from modtrain.training.plan import resolve
from tests.helpers.problems import problems_of


def note(name="fsdp", device="cpu", devices=1, overrides=(), launch=None, environment=()):
    config, launch = StrategyConfig(name=name), launch or Launch()
    return one_process_note(config, launch, device, devices, overrides, dict(environment))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "single"])
@pytest.mark.parametrize(("device", "devices"), [("cpu", 1), ("cuda", 1), ("cuda", 8)])
def test_the_note_has_the_command_that_starts_all(name, device, devices):
    given = [f"strategy={name}", "name=a b", "model=tiny", "budget.steps=2"]
    head, command, local = note(name, device, devices, given).split("\n")
    assert ("launch=local num_processes=2" in local) is (devices == 1)
    assert head.startswith("warning: ") is (devices > 1)
    assert "1 of 8 GPUs" in head or devices == 1
    *torchrun, verb, one, two, three, last = shlex.split(command)
    assert torchrun[:2] == ["torchrun", "--standalone"]
    assert torchrun[3] == str(max(2, devices))
    config = compose(verb, [one.replace("a b", '"a b"'), two, three, last])
    assert (config.strategy.name, config.name) == (name, "a b")


def test_idle_devices_are_named_for_a_strategy_for_one_process_too():
    assert "1 of 4 GPUs" in note("single", "cuda", 4)
    assert note("single", "cuda", 4).split("\n")[1].endswith("strategy=ddp")
    assert note("single", "cuda", 1) == note("single") == ""


def test_nothing_is_printed_where_several_processes_were_started():
    assert note("fsdp", "cuda", 8, launch=Launch(8, 0, 0, 8)) == ""


def test_in_a_job_of_slurm_the_note_names_submit():
    assert "modtrain submit" in note(environment={"SLURM_JOB_ID": "1"})


@pytest.mark.parametrize("key", ["tensor_parallel", "context_parallel", "world_size"])
def test_a_degree_that_one_process_cannot_have_names_the_command(key, prepared):
    overrides = ["name=x", "budget.steps=1", "strategy=fsdp", f"strategy.{key}=4"]
    config = compose("train", [*overrides, "model=tiny", f"data.path={prepared}"])
    problem = problems_of(resolve, config, launch=Launch())[f"strategy.{key}"]
    assert "torchrun --standalone --nproc-per-node 4 -m modtrain train" in problem.remedy
