"""The code's version in a run's manifest, where git does not say it at once."""

import subprocess

import pytest

import modtrain
from modtrain.training import run_directory


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one commit, as the one that the package is in."""
    (tmp_path / "modtrain").mkdir()
    (tmp_path / "modtrain/__init__.py").write_text("")
    monkeypatch.setattr(modtrain, "__file__", str(tmp_path / "modtrain/__init__.py"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    return tmp_path


def test_a_checkout_of_another_user_has_its_version(checkout, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    status = ["git", "-C", str(checkout), "status"]
    refused = subprocess.run(status, capture_output=True, check=False)
    assert b"dubious ownership" in refused.stderr
    (checkout / "modtrain/__init__.py").write_text("changed = 1\n")
    version = run_directory.code_version()
    assert len(version["commit"]) == 40
    assert "+changed = 1" in version["diff"]


def test_a_checkout_that_git_cannot_read_has_no_version_and_is_named(checkout, caplog):
    (checkout / ".git/HEAD").write_text("")
    assert run_directory.code_version() is None
    assert "the code's version is not recorded: fatal" in caplog.text
