"""Runs on documents that are packed by best fit: padding takes no part in what is learned."""

import json
from pathlib import Path

import pytest

from modtrain.cli.compose import compose
from modtrain.data.stream.datamodule import TokenDataModule
from modtrain.inference.config import EvalRunConfig, InspectConfig
from modtrain.inference.data_view.config import DataViewConfig
from modtrain.inference.data_view.step_samples import samples_of
from modtrain.inference.data_view.view import view_data
from modtrain.inference.evaluate.evaluate import evaluate_run
from modtrain.inference.inspect.inspect import inspect_run
from modtrain.training.config import PlanConfig
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import derive
from modtrain.training.plan_report import show
from modtrain.training.run_directory import RunDirectory
from tests.data.data_cases import prepare_packed
from tests.helpers.marks import slow_but
from tests.helpers.ranks import on_ranks
from tests.helpers.runs import assert_same_records, losses_of, run, run_lines, stopping
from tests.helpers.saved import assert_same_bits, newest_weights

pytestmark = pytest.mark.usefixtures("no_stop_request")

SEQ_LEN = 128


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory with 11% of padding."""
    return prepare_packed(tmp_path_factory.mktemp("packed"), 200, SEQ_LEN)


def test_plan_reports_tokens_with_and_without_padding(packed, tmp_path, capsys):
    config = compose("train", run_lines(packed, tmp_path, "one"))
    show(PlanConfig(**vars(config)))
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    print(printed)
    assert "10.84% of these tokens: FLOPs are spent on it, and about 1,826" in printed
    assert "1 of 156; laid end to end 93" in printed


SPLITS = {
    "ranks": (2, ["strategy=ddp"]),
    "accumulated": (1, []),
    "context": (2, ["strategy=fsdp_cp"]),
    "experts": (2, ["strategy=fsdp_ep", "model.experts.count=4", "model.experts.dim=8"]),
    "tensor": (2, ["strategy=fsdp_tp", "data.document_mask=true"]),
    "deepspeed": (2, ["strategy=deepspeed_2"]),
}


@pytest.mark.on_commit("ranks")
@pytest.mark.parametrize("name", slow_but((), SPLITS))
def test_every_split_of_a_step_learns_the_same(packed, tmp_path, name):
    """Over micro-batches and ranks, none of which have equally many tokens."""
    ranks, more = SPLITS[name]
    own = [line for line in more if not line.startswith("strategy=")]
    # A balance loss is of the choices of a micro-batch, with padding or without.
    size = 1 if name == "experts" else 4
    whole = [f"batch.micro_batch_size={size}", "eval.every=4", *own]
    assert run(run_lines(packed, tmp_path, "one", *whole)) == "complete"
    lines = run_lines(packed, tmp_path, "split", "batch.micro_batch_size=1", "eval.every=4", *more)
    ended = [run(lines)] if ranks == 1 else on_ranks(run, ranks, lines, joins=False)
    assert ended == ["complete"] * ranks
    losses = [losses_of(tmp_path / name) for name in ("split", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_records(tmp_path, "one", "split")


def test_the_data_are_described(packed, tmp_path, capsys):
    view_data(DataViewConfig(path=str(packed)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "train: 10.84% of the places are padding; 1 of 156 documents are cut" in printed
    view_data(DataViewConfig(path=str(packed), format="jsonl"))
    of_split = {
        line["split"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    train = of_split["train"]
    assert train["num_read"] == train["num_tokens"]
    assert (train["num_cut"], train["num_cut_if_concatenated"]) == (1, 93)
    assert train["num_padding"] == train["num_sequences"] * (SEQ_LEN + 1) - train["num_tokens"]


@pytest.mark.slow
def test_a_run_resumes_and_reports_its_padding_and_documents(packed, tmp_path):
    assert run(run_lines(packed, tmp_path, "whole", "data.document_mask=true")) == "complete"
    cut = run_lines(packed, tmp_path, "cut", "data.document_mask=true")
    with stopping(1):
        assert run(cut) == "stopped"
    assert run(cut) == "complete"
    assert_same_bits(newest_weights(tmp_path / "cut", 4), newest_weights(tmp_path / "whole", 4))
    directory = RunDirectory(tmp_path / "whole")
    recorded = {r["step"]: r["padding"] for r in read_metrics(directory.metrics) if "padding" in r}
    for step in (1, 2, 3, 4):
        samples = list(samples_of(directory, step))
        num_read = [sum(len(d.tokens) for d in sample.documents) for sample in samples]
        assert num_read == [sum(token >= 0 for token in sample.tokens) for sample in samples]
        share = 1 - sum(count - 1 for count in num_read) / (len(samples) * SEQ_LEN)
        assert recorded[step] == pytest.approx(share)
        assert all(
            d.num_tokens == len(d.tokens) <= SEQ_LEN + 1 for s in samples for d in s.documents
        )


@pytest.mark.nightly
def test_the_held_out_loss_is_over_real_tokens(packed, tmp_path):
    assert run(run_lines(packed, tmp_path, "one")) == "complete"
    config = RunDirectory(tmp_path / "one").read_config()
    plan = derive(config)
    data = TokenDataModule(
        config.data, micro_batch_size=1, accumulate=1, num_steps=plan.steps, eval_batch_size=2
    )
    num_targets = sum(batch.num_targets for batch in data.val_dataloader())
    assert num_targets < len(data.valid_data) * SEQ_LEN
    figures = []
    for batch_size, swap in ((1, True), (3, False)):
        asked = EvalRunConfig(run="one", runs_dir=str(tmp_path), batch_size=batch_size, swap=swap)
        figures.append(evaluate_run(asked))
    first, second = figures
    assert first["tokens"] == second["tokens"] == num_targets
    assert first["causal_loss"] == pytest.approx(second["causal_loss"], rel=1e-6)
    worth = first["router_worth"]
    assert worth["loss"] == pytest.approx(first["causal_loss"], rel=1e-5)
    asked = EvalRunConfig(run="one", runs_dir=str(tmp_path), sweep=[0.25])
    evaluate_run(asked)
    inspect_run(
        InspectConfig(run="one", runs_dir=str(tmp_path), output=str(tmp_path / "page.html"))
    )
    assert (tmp_path / "page.html").exists()
