"""Directories of runs as training leaves them, written without training."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from modtrain.cluster.runs import HELD_OUT
from modtrain.experiments.report.config import ReportConfig
from modtrain.training.config import TrainConfig

SHARDS = "5" * 64
CAUSAL_FLOPS = "held_out/causal_flops_per_token"


def write_run(
    root: Path,
    name: str,
    *,
    loss: float | None = 3.0,
    steps: int = 40,
    seed: int = 0,
    shards: str = SHARDS,
    complete: bool = True,
    health: bool = True,
    lines: tuple[str, ...] = (),
    changes: dict | None = None,
    **model,
) -> Path:
    """Write a run with an evaluation every ten steps. changes: of its configuration, by section."""
    path = root / name
    path.mkdir(parents=True)
    config = TrainConfig(name=name, runs_dir=str(root), seed=seed)
    shape = {"num_layers": 4, "d_model": 32, "vocab_size": 100} | model
    data = replace(config.data, path="data/sotu", seq_len=64, seed=seed)
    config = replace(config, model=replace(config.model, **shape), data=data)
    content = asdict(config)
    for section, values in (changes or {}).items():
        content[section] |= values
    (path / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    start = {"host": "node", "device": "cpu", "time": "2026-11-01T00:00:00+00:00"}
    manifest = {"data_fingerprint": shards, "starts": [start]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "command.txt").write_text(f"modtrain train name={name}\n")
    records = list(_records(config, loss, steps, health))
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(text + "".join(lines))
    if complete:
        last = {key: value for record in records for key, value in record.items()}
        (path / "result.json").write_text(json.dumps(last | {"steps": steps}))
        (path / "COMPLETED").touch()
    return path


def _records(config, loss, steps, health):
    cost = 3000.0
    labels = config.model.routed_labels if health else []
    for step in range(5, steps + 1, 5):
        at = {"step": step, "tokens": step * 512, "flops": step * 512 * cost}
        router = {
            f"router/{label}/{key}": value * step / steps
            for label in labels
            for key, value in (("gate_mean", 0.5), ("update_ratio", 0.2))
        }
        pace = {"throughput/step_seconds": 0.5 + step / 1000}
        yield at | {"loss": 3.0, **router, **pace}
        if step % 10 == 0:
            held_out = {CAUSAL_FLOPS: cost / 3 - 7.0}
            if loss is not None:
                held_out[HELD_OUT] = loss + (steps - step) / 50
            if step == steps and labels:
                held_out |= {f"held_out/{x}/worth": 0.01 * i for i, x in enumerate(labels)}
                held_out["held_out/routed_worth"] = 0.03
            yield at | held_out


def write_swaps(run: Path) -> None:
    rows = [
        {"choice": c, "gate": "own", "router": "all", "loss": 3.1, "change": x, "low": x / 2}
        | {"high": 2 * x}
        for c, x in (("zero", 0.02), ("random", 0.01))
    ]
    content = {"router_worth": {"decision": "predictor", "sequences": 8, "loss": 3, "swaps": rows}}
    (run / "eval-000000040.json").write_text(json.dumps(content))


def write_comparison(root: Path, name: str, arms: dict[str, dict]) -> None:
    content = {
        arm: {"control": None, "is_routed": False, "micro_batch_seconds": 0.1} | values
        for arm, values in arms.items()
    }
    (root / name / "compare.json").write_text(json.dumps(content))


def write_grid(root: Path, name: str, sizes=(0.25, 0.5, 1, 2, 4), budgets=(1e15, 4e15, 16e15)):
    """Write the runs of a grid, and its points: dense ones of a law, and 1.3 times as fast ones."""
    rows = []
    for family, factor in (("dense", 1.0), ("mod", 1.3)):
        for C in budgets:
            for size in sizes:
                N = size * (factor * C / 120) ** 0.5
                D = factor * C / 6 / N
                loss = 1.69 + 406.4 / N**0.34 + 410.7 / D**0.28
                run = f"{name}/family={family},budget={C:g},size={size:g}"
                write_run(root, run, loss=loss, health=family == "mod")
                row = {"family": family, "N": N, "D": D, "C": C, "loss": loss}
                rows.append(row | {"run": run, "N_effective": N, "N_total": 2 * N})
    with (root / name / "points.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def report_of(root: Path, *runs: str, **changes) -> ReportConfig:
    values = {"output": str(root.parent / "report"), "bootstrap_samples": 0}
    return ReportConfig(runs=list(runs) or ["*"], runs_dir=str(root), **(values | changes))
