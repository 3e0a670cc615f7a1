"""The scores of a run are those of lm-eval's model for Hugging Face on the exported folder."""

import pytest

from modtrain.inference.config import TrainedRunConfig
from modtrain.inference.loading import load_run
from modtrain.interop.config import ExportConfig
from modtrain.interop.export import export

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'modtrain[tasks]'")
pytest.importorskip("accelerate", reason="lm-eval's model for Hugging Face needs accelerate")

from lm_eval.evaluator import evaluate

from modtrain.inference.tasks.catalog import load_tasks
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.tasks.language_model import ModtrainLM

pytestmark = pytest.mark.nightly
CASES = {
    "dense": ["model.pattern=dense"],
    "routed": ["model.capacity=0.5", "model.router.causal=[threshold,predictor]"],
}


@pytest.fixture(scope="module", params=CASES)
def models(request, start, tmp_path_factory):
    """A run as lm-eval sees it: by modtrain, and by transformers as exported."""
    from lm_eval.models.huggingface import HFLM

    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        run = start(request.param, *CASES[request.param])
        folder = tmp_path_factory.mktemp("exported") / request.param
        where = {"run": run.path.name, "runs_dir": str(run.path.parent)}
        export(ExportConfig(**where, output=str(folder)))
        loaded = load_run(TrainedRunConfig(**where, accelerator="cpu", precision="fp32"))
        selection = loaded.trained.model.causal_selections[0]
        theirs = HFLM(
            str(folder), device="cpu", dtype="float32", batch_size=4, trust_remote_code=True
        )
        yield ModtrainLM(loaded, selection, batch_size=3), theirs


def results_of(model, tasks, settings):
    """Score a model on each task: metrics, and the responses to every request."""
    results = {}
    for loaded in load_tasks(tasks, settings).values():
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
            task.set_fewshot_seed(seed=settings.seed)
        evaluated = evaluate(model, loaded, bootstrap_iters=0)
        for name, values in evaluated["results"].items():
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            assert numbers
            responses = [sample["resps"] for sample in evaluated["samples"][name]]
            results[name] = numbers, responses
    return results


def flat(responses):
    """Yield the leaves of nested lists and tuples."""
    for response in responses:
        if isinstance(response, list | tuple):
            yield from flat(response)
        else:
            yield response


@pytest.mark.parametrize("num_fewshot", [0, 1])
def test_scores_are_those_of_the_exported_folder(models, task_files, num_fewshot):
    names = ["copy", "lookup", "addition", "parity"]
    names += [path for name, path in task_files.items() if num_fewshot == 0 or name != "held"]
    settings = TaskConfig(num_fewshot=num_fewshot, num_examples=12)
    ours, theirs = (results_of(model, names, settings) for model in models)
    assert [*ours] == [*theirs]
    # A router that took all or none would prove little.
    assert all(0 < share < 1 for share in models[0].cost.realised_capacity.values())
    for name, (metrics, responses) in ours.items():
        their_metrics, their_responses = theirs[name]
        # A loss has the rounding of its log probabilities.
        is_exact = name != "held"
        assert metrics == (their_metrics if is_exact else pytest.approx(their_metrics, rel=1e-5))
        for actual, expected in zip(flat(responses), flat(their_responses), strict=True):
            is_number = isinstance(expected, float)
            assert actual == (pytest.approx(expected, abs=1e-4) if is_number else expected), name


def test_requests_without_context_and_at_the_ends_of_windows_agree(models):
    from lm_eval.api.instance import Instance

    ours, theirs = models
    texts = ["", "x", "the tree and the river " * 20, "<|endoftext|>the tree"]
    pairs = [("", "the river"), ("the tree ", "and the"), ("the tree", " and the river " * 3)]
    for method, arguments in (
        ("loglikelihood", pairs),
        ("loglikelihood_rolling", [(text,) for text in texts]),
    ):
        requests = [Instance(method, {}, each, 0) for each in arguments]
        actual, expected = (flat(getattr(model, method)(requests)) for model in models)
        assert list(actual) == pytest.approx(list(expected), abs=1e-4)
    assert (ours.max_length, ours.eot_token_id) == (theirs.max_length, theirs.eot_token_id)
    assert ours.prefix_token_id == theirs.prefix_token_id
