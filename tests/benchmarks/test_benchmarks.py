"""Each benchmark runs, at a small size, and ends with one JSON object of numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "mod_step": "--d-model 64 --layers 2 --seq-len 64 --vocab 128 --rounds 2 --skip-compiled",
    "moe_layer": "--d-model 64 --seq-len 64 --batch 2 --rounds 2",
    "dense_step": "--d-model 64 --layers 1 --seq-len 64 --vocab 300 --rounds 2 --log-every 2"
    " --threads 1",
    "loss_memory": "--tokens 1024 --d-model 64 --vocab 8192 --rounds 2",
    "decode": "--d-model 64 --layers 2 --vocab 128 --prompt 64 --middle-prompt 32"
    " --short-prompt 16 --tokens 4 --train-steps 2 --rounds 2",
    "data_stream": "--tokens 200000 --seq-len 64 --rounds 2",
    "prepare": "--megabytes 0.1 0.2 --vocab 300 --rounds 1",
    "startup": "--rounds 1",
    "strategies": "--steps 4 --processes 2 4 --strategies ddp fsdp fsdp_tp fsdp_ep fsdp_cp"
    " deepspeed_2 --models mod staged",
    "checkpoint": "--d-model 64 --layers 1 --vocab 128 --seq-len 32 --steps 2 --rounds 2",
    "decision_margin": "--model tiny --corpus words --steps 4 --sequences 4 --batch 4 --threads 1",
    "scale": "--models tiny --growth tiny --worlds 16 64 --setups fsdp --seq-len 64"
    " --set model.vocab_size=128 model.num_layers=2",
}
RATIOS = {
    "mod_step": {"eta_eager", "flops_ratio", "time_ratio_eager", "gather_scatter_share"},
    "moe_layer": {"moe", "mode", "moe_expert_choice"},
    "dense_step": {"over_plain_loop", "steps_per_second"},
    "loss_memory": {"memory_ratio", "time_ratio"},
    "decode": {
        *("speedup_b1", "speedup_b8", "speedup_b8_short", "cache_ratio"),
        *("eta_prefill", "flops_ratio_prefill", "over_hf"),
    },
    "data_stream": {"over_memmap", "over_unchecked"},
    "prepare": {"over_tokenizers", "over_tokenizers_processor", "growth", "growth_processor"},
    "startup": {"help_seconds", "first_step_seconds", "over_import"},
    "strategies": {"max_loss_difference", "different_choices", "strategies", "runs"},
    "checkpoint": {
        *("stall_ratio", "noise_ratio"),
        *("save_over_disk", "verify_over_disk", "load_over_disk"),
    },
    "decision_margin": {
        f"{figure}_{precision}"
        for figure in ("parted", "expected", "rounding", "sequences")
        for precision in ("fp32", "bf16")
    },
    "scale": {"collectives_growth", "operators_growth", "over_theory", "over_bound", "unforeseen"},
}


def test_every_benchmark_is_tested_and_run_by_make_bench():
    names = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert names == SMALL.keys() == RATIOS.keys()
    target = (ROOT / "Makefile").read_text().split("bench:")[1].split("done")[0]
    assert all(name in target for name in names)


@pytest.mark.on_commit(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_ends_with_its_ratios(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name].split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("benchmark") == name
    assert RATIOS[name] <= result.keys()
    if name == "strategies":
        assert result.pop("different_choices") == 0
        assert result["max_loss_difference"] <= 1e-4
        assert (result["strategies"], result["runs"]) == (6, 22)
    if name == "decision_margin":
        # Decisions that differ are rare: there may be none.
        assert all(value >= 0 for value in result.values())
        return
    assert all(value > 0 for value in result.values())


@pytest.mark.nightly
@pytest.mark.slow
def test_the_benchmark_of_data_behind_a_url_ends_with_its_figures():
    sizes = "--tokens 400000 --seq-len 64 --step-seconds 0.05 --warm-up 2 --seconds 4 --shards 500"
    command = [sys.executable, "-m", "benchmarks.data_stream", "remote", *sizes.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= result["waiting"] <= 1
    assert result["bytes_over_read"] > 0.9
    assert result["with_index_mib"] > result["before_mib"]
