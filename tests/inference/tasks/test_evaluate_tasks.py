"""Scores on tasks by lm-eval: what is written and printed, and which tasks are refused."""

import json

import pytest

from modtrain.common.errors import ConfigError, DataError
from modtrain.inference.config import ComputeBudgetConfig, EvalRunConfig
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.tasks.evaluate_tasks import evaluate_tasks
from modtrain.inference.tasks.report import show_tasks

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modtrain[tasks]'")

from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from modtrain.inference.tasks import catalog

pytestmark = pytest.mark.slow
TASK = """task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{question}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def run(start):
    return start("routed", "model.router.causal=[predictor,threshold]").path


@pytest.fixture
def score(run, tmp_path):
    """Score the run on tasks; the results go to a folder of the test's own."""

    def evaluate(*names, task=None, **settings):
        where = {"run": run.name, "runs_dir": str(run.parent), "output": str(tmp_path / "results")}
        config = EvalRunConfig(
            **where,
            tasks=[*names],
            task=task or TaskConfig(num_examples=6),
            accelerator="cpu",
            **settings,
        )
        return evaluate_tasks(config)

    return evaluate


@pytest.fixture
def folder(tmp_path):
    """A folder for tasks, and what writes one with its data."""
    own = tmp_path / "own"
    own.mkdir()
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "Which?", "choices": ["a", "b"]}) + "\n")

    def write(question="{{question}}", metric="acc", more=""):
        text = TASK.format(data=data, question=question, metric=metric)
        (own / "mine.yaml").write_text(text + more)
        return TaskConfig(path=str(own))

    write.path = own
    return write


def test_scores_are_written_with_decision_budget_and_flops(score, task_files, tmp_path, capsys):
    names = [task_files[name] for name in ("questions", "held", "free")]
    settings = ComputeBudgetConfig(decision="threshold", capacity=0.5)
    results = score("copy", "parity", *names, inference=settings)
    (path,) = (tmp_path / "results").glob("*.json")
    assert path.name == "tasks-000000012-threshold-capacity_0.5.json"
    assert json.loads(path.read_text()) == results
    assert results["decision"] == "threshold"
    assert results["budget"] == {"capacity": 0.5, "calibration_sequences": 64}
    tasks = results["tasks"]
    assert [*tasks] == ["copy", "parity", "questions", "held", "free"]
    assert tasks["parity"]["chance"] == 0.5
    assert tasks["questions"]["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert tasks["copy"]["chance"] is tasks["held"]["chance"] is None
    for task in tasks.values():
        assert 0 < task["flops"] <= 1.1 * task["dense_equivalent_flops"]
        assert len(task["realised_capacity"]) == 2
    capsys.readouterr()
    show_tasks(results)
    printed = capsys.readouterr().out
    assert "decision threshold, capacity=0.5" in printed
    assert all(name in printed for name in tasks)


def test_a_sweep_has_a_curve_over_flops(score, tmp_path, capsys):
    results = score("copy", "parity", sweep=[1.0, 0.25])
    files = sorted(path.name for path in (tmp_path / "results").iterdir() if path.is_file())
    assert files == ["tasks-sweep-000000012.json", "tasks-sweep-000000012.png"]
    assert [point["capacity"] for point in results["points"]] == [0.25, 1.0]
    for name in ("copy", "parity"):
        low, high = (point["tasks"][name] for point in results["points"])
        assert low["flops"] < high["flops"]
        assert set(high["realised_capacity"].values()) == {1.0}
        assert name in results["as_trained"]
    show_tasks(results)
    assert "as trained" in capsys.readouterr().out


def test_a_task_of_a_folder_is_scored(score, folder):
    results = score("mine", task=folder())
    assert results["tasks"]["mine"]["num_examples"] == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"more": "process_docs: !function code.docs\n"}, "runs Python: mine.yaml: code.docs"),
        ({"metric": "glue"}, "a metric from elsewhere than lm-eval: glue"),
        ({"more": "dataset_path: pandas\n"}, "reads its data by none of json, csv"),
    ],
)
def test_a_task_that_runs_code_is_refused(settings, reason, score, folder):
    marker = folder.path / "was_run"
    (folder.path / "code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\ndef docs(docs): return docs\n"
    )
    task = folder(**settings)
    (folder.path / "group.yaml").write_text("group: all_of_them\ntask: [{task: mine}]\n")
    for name in ("mine", "all_of_them"):
        with pytest.raises(ConfigError, match=reason):
            score(name, task=task)
    assert not marker.exists()


def test_a_task_in_place_of_one_of_lm_eval_is_checked_as_well(score, folder, monkeypatch):
    task = folder(more="process_docs: !function code.docs\n")
    theirs = TaskManager(include_path=str(folder.path), include_defaults=False)
    theirs.task_index["group_of_lm_eval"] = Entry(
        "group_of_lm_eval", Kind.GROUP, catalog._LM_EVAL_TASKS / "a.yaml", {"task": ["mine"]}
    )
    theirs._all_tasks.append("group_of_lm_eval")
    monkeypatch.setattr(catalog._Catalog, "_everything", lambda self: theirs)
    with pytest.raises(ConfigError, match="runs Python"):
        score("group_of_lm_eval", task=task)


def test_code_is_run_where_it_is_allowed(score, folder):
    marker = folder.path / "was_run"
    (folder.path / "code.py").write_text(
        f"open({str(marker)!r}, 'w').close()\ndef docs(docs): return docs\n"
    )
    settings = folder(more="process_docs: !function code.docs\n")
    score("mine", task=TaskConfig(path=settings.path, allow_code=True))
    assert marker.exists()


def test_a_template_cannot_reach_python(score, folder):
    with pytest.raises(DataError, match="SecurityError"):
        score("mine", task=folder("{{ ''.__class__.__mro__ }}"))


def test_an_unknown_task_is_answered_with_near_names(score, monkeypatch):
    few = TaskManager(include_defaults=False)
    monkeypatch.setattr("modtrain.inference.tasks.catalog.TaskManager", lambda **_: few)
    with pytest.raises(ConfigError, match=r"tasks=additon: .*\n.*did you mean addition\?"):
        score("additon")


def test_a_task_whose_data_are_not_to_be_had_names_the_network(score, folder, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(DataError, match="hub, which cannot be reached"):
        score("mine", task=folder())


def test_two_tasks_of_one_name_are_refused(score, task_files, tmp_path):
    (tmp_path / "free.txt").write_text("text")
    with pytest.raises(ConfigError, match="two tasks with the name free"):
        score(task_files["free"], str(tmp_path / "free.txt"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{until: [x], max_gen_toks: 64}", "generates 64 tokens, and the model reads 64"),
        ("{until: [x], max_gen_toks: 4, num_beams: 3}", "num_beams, which modtrain does not take"),
    ],
)
def test_generation_that_cannot_be_is_refused(settings, reason, score, folder):
    more = f"generation_kwargs: {settings}\noutput_type: generate_until\ndoc_to_choice: null\n"
    task = folder(metric="exact_match", more=more)
    with pytest.raises(DataError, match=reason):
        score("mine", task=task)


def test_lm_evals_command_takes_a_run(run):
    from modtrain.inference.tasks.language_model import ModtrainLM, register

    register()
    register()
    from lm_eval.api.registry import get_model

    arguments = f"run={run},decision=threshold,layer_cap=0.5,precision=fp32"
    model = get_model("modtrain").create_from_arg_string(
        arguments, {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(model, ModtrainLM)
    info = model.get_model_info()
    assert (info["decision"], info["step"], model.batch_size) == ("threshold", 12, 2)
    assert info["compute_budget"] == [None, 0.5, None]
    with pytest.raises(ConfigError, match="pretrained"):
        ModtrainLM.create_from_arg_string("pretrained=gpt2")
    with pytest.raises(ConfigError, match="batch_size=auto"):
        ModtrainLM.create_from_arg_string(arguments, {"batch_size": "auto"})
