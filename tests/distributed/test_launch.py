"""Ranks from the variables of launchers, and what strategies make of them."""

import pytest

from modtrain.common.errors import ConfigError
from modtrain.distributed.launch import Launch
from tests.helpers.problems import problems_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2"},
}


def test_torchrun_and_srun_tell_the_same():
    expected = Launch(8, 5, 1, 4)
    assert Launch.from_environment(TORCHRUN) == Launch.from_environment(SRUN) == expected
    assert expected.num_nodes == 2


def test_without_a_launcher_a_process_is_alone():
    assert Launch.from_environment({}) == Launch()
    batch_script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert Launch.from_environment(batch_script) == Launch()


def test_what_is_exported_is_read_back():
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "1"}
    Launch.from_environment(SRUN).export(environment)
    assert Launch.from_environment(environment) == Launch(8, 5, 1, 4)
    assert environment["GROUP_RANK"] == "1"
    alone: dict[str, str] = {}
    Launch().export(alone)
    assert not alone


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"RANK": "8"}, "RANK"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
    ],
)
def test_invalid_variables_of_a_launcher_are_an_error(changed, key):
    assert list(problems_of(Launch.from_environment, TORCHRUN | changed)) == [key]


def test_processes_that_do_not_know_where_to_meet_are_an_error():
    with pytest.raises(ConfigError, match="need a rendezvous address"):
        Launch(2, 0, 0, 2).export({"MASTER_PORT": "1"})
