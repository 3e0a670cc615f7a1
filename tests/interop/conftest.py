"""Runs to export."""

import pytest

from modtrain.cli.compose import compose
from modtrain.training.run import train


@pytest.fixture(scope="session", autouse=True)
def modules_folder(tmp_path_factory):
    """Let transformers copy a folder's code to a place of the tests' own, not to the home."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """A folder with a routed run and a dense one, of 12 steps, evaluated at 6 and 12."""
    folder = tmp_path_factory.mktemp("runs")
    quick = ["log=jsonl", "log.progress=false", f"runs_dir={folder}"]
    causal = "model.router.causal=[predictor,auxiliary,threshold]"
    train(compose("train", [*tiny, *quick, "name=routed", causal]))
    train(compose("train", [*tiny, *quick, "name=dense", "model.pattern=dense"]))
    return folder
