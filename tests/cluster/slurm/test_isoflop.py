"""`modtrain isoflop hydra/launcher=slurm` on a real Slurm: trunks first, then their branches."""

import csv
import sys

import pytest

from modtrain.training.run_directory import RunDirectory
from tests.cluster.slurm.slurm_cluster import PATIENCE, ROOT
from tests.experiments.isoflop.grid_cases import grid_arguments


@pytest.mark.nightly
def test_a_grid_is_two_arrays_and_its_points_are_collected(cluster, tiny, tmp_path):
    shared = ("schedule=wsd", "schedule.warmup_steps=3", "share_trunk=true")
    budgets = ("budgets=[6e8,2.4e9]", "sizes=[0.5,1]", "only=[dense]")
    on_slurm = ("hydra/launcher=slurm", "cluster=cpu", "cluster.partition=main")
    arguments = grid_arguments(tiny, *budgets, *shared, *on_slurm)
    command = [sys.executable, "-m", "modtrain", *arguments]
    done = cluster.run(
        *command, check=False, cwd=tmp_path, timeout=PATIENCE, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "runs/g/points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    (trunk,) = {row["trunk"] for row in rows} - {""}
    assert RunDirectory(tmp_path / "runs" / trunk).is_complete
    assert len(list((tmp_path / "runs/g").glob("*.sbatch"))) == 2
