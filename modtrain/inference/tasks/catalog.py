"""From the names of tasks to lm-eval's tasks: a user's files and folder, modtrain's, lm-eval's.

Imports lm-eval, of the extra ``modtrain[tasks]``.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from modtrain.common.errors import ConfigError, DataError, Problem
from modtrain.inference.tasks import synthetic
from modtrain.inference.tasks.config import TaskConfig
from modtrain.inference.tasks.task_files import Examples, is_task_file, read_examples
from modtrain.inference.tasks.task_folder import DATA_READERS, read_task_file

# Tokens to generate for a free answer, however long the right ones are.
_MAX_ANSWER_TOKENS = 256
_FEWSHOT_EXAMPLES = 32
# The code of these is lm-eval's own.
_LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent

_log = logging.getLogger(__name__)


# What lm-eval's `evaluate` takes: ``tasks`` and ``groups`` by name, and ``group_map``.
LoadedTask = dict[str, Any]


def load_tasks(names: Sequence[str], config: TaskConfig) -> dict[str, LoadedTask]:
    """Return what lm-eval's `evaluate` takes of each name, by the name that results have.

    Raises:
        ConfigError: a name is not known, or a task would run code without leave.
        DataError: the data of a task cannot be read, or only over the network.
    """
    restrict_templates()
    catalog = _Catalog(config)
    loaded: dict[str, LoadedTask] = {}
    for name in names:
        shown = Path(name).stem if is_task_file(name) else name
        if shown in loaded:
            reason = f"has two tasks with the name {shown}"
            raise ConfigError([Problem("tasks", [*names], reason, "rename a file")])
        loaded[shown] = catalog.load(name, shown)
    return loaded


def restrict_templates() -> None:
    """Let the templates of tasks format text, and no more: lm-eval's own reach all of Python."""
    restricted = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    restricted.filters |= {"regex_replace": utils.regex_replace}
    utils.env = restricted


class _Catalog:
    """Where tasks are looked for; a folder is read, and lm-eval's own are listed, when needed."""

    def __init__(self, config: TaskConfig) -> None:
        self._config = config
        self._own: TaskManager | None = None
        self._all: TaskManager | None = None
        if config.path is not None:
            self._own = TaskManager(include_path=config.path, include_defaults=False)

    def load(self, name: str, shown: str) -> LoadedTask:
        if is_task_file(name):
            return _alone(make_task(shown, read_examples(Path(name))))
        own = self._own
        if own is not None and name in own.all_tasks:
            # A group may name tasks of lm-eval.
            if self._check(own, name) <= set(own.all_tasks):
                return _load(own, name)
        elif name in synthetic.KINDS:
            return _alone(self._made_task(name))
        manager = self._everything()
        if name not in manager.all_tasks:
            raise ConfigError([_unknown(name, manager)])
        self._check(manager, name)
        return _load(manager, name)

    def _everything(self) -> TaskManager:
        """Return all of lm-eval's tasks beside the user's."""
        if self._all is None:
            _log.info("reading the list of lm-eval's own tasks: this takes seconds")
            self._all = TaskManager(include_path=self._config.path)
        return self._all

    def _made_task(self, name: str) -> Any:
        config = self._config
        made, solved = (
            _examples(synthetic.examples(name, count, config.seed, held_out=is_asked))
            for count, is_asked in ((config.num_examples, True), (_FEWSHOT_EXAMPLES, False))
        )
        # The choices of these have one length.
        return make_task(name, made, solved, skipped_metrics=["acc_norm"])

    def _check(self, manager: TaskManager, name: str) -> set[str]:
        """Return a task and all that it names. Raises ConfigError for code of the user's folder."""
        members: set[str] = set()
        waiting = [name]
        while waiting:
            member = waiting.pop()
            entry = manager.task_index.get(member)
            if member not in members and entry is not None:
                if entry.yaml_path is None:  # a tag
                    waiting += entry.tags
                elif entry.yaml_path.is_relative_to(_LM_EVAL_TASKS):
                    waiting += _named_tasks((entry.cfg or {}).get("task"))
                else:
                    waiting += self._check_file(member, entry.yaml_path)
            members.add(member)
        return members

    def _check_file(self, name: str, path: Path) -> list[str]:
        named = read_task_file(path)
        if self._config.allow_code:
            return named.members
        unknown = [metric for metric in named.metrics if metric not in _known_metrics()]
        reasons = [
            (named.functions, "runs Python"),
            (named.readers, f"reads its data by none of {', '.join(DATA_READERS)}"),
            (unknown, "loads a metric from elsewhere than lm-eval"),
        ]
        problems = [
            Problem(
                "tasks",
                name,
                f"{reason}: {', '.join(names)}",
                f"read {path} and what it names; then task.allow_code=true",
            )
            for names, reason in reasons
            if names
        ]
        if problems:
            raise ConfigError(problems)
        return named.members


def _named_tasks(value: object) -> list[str]:
    """Return the names of tasks and groups in what a group of lm-eval has under ``task``."""
    if isinstance(value, list):
        return [name for item in value for name in _named_tasks(item)]
    if isinstance(value, dict):
        return [n for key in ("task", "group") for n in _named_tasks(value.get(key))]
    return [value] if isinstance(value, str) else []


def _unknown(name: str, manager: TaskManager) -> Problem:
    near = difflib.get_close_matches(name, sorted({*synthetic.KINDS, *manager.all_tasks}), 3)
    if near:
        remedy = f"did you mean {' or '.join(near)}?"
    elif name.lower().endswith((".yaml", ".yml")):
        remedy = "give the folder as task.path, and the task by its name"
    else:
        made = ", ".join(synthetic.KINDS)
        remedy = f"use {made}, a .jsonl or .txt file, a task of task.path, or one of lm-eval"
    return Problem("tasks", name, "is no task that is known", remedy)


def _known_metrics() -> set[str]:
    import lm_eval.api.metrics  # noqa: F401, PLC0415  (it fills the registry)

    return {*metric_registry.keys()}


def _alone(task: Any) -> LoadedTask:
    return {"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}


def _load(manager: TaskManager, name: str) -> LoadedTask:
    try:
        return dict(manager.load([name]))
    except ConnectionError as error:
        raise DataError(
            f"task {name}: its data are on Hugging Face's hub, which cannot be reached ({error})\n"
            "remedy: fetch them where it can, with the same HF_HOME; or give examples of your own"
            " as a .jsonl file in their place"
        ) from None
    except Exception as error:  # of the task's own configuration, which may be anything
        raise DataError(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _examples(made: Sequence[synthetic.Example]) -> Examples:
    if made[0].choices:
        documents = [
            {
                "prompt": example.prompt,
                "choices": [*example.choices],
                "target": example.choices.index(example.answer),
            }
            for example in made
        ]
        return Examples("choice", documents)
    free = [{"prompt": example.prompt, "answers": [example.answer]} for example in made]
    return Examples("answer", free)


def make_task(
    name: str,
    examples: Examples,
    solved: Examples | None = None,
    skipped_metrics: Sequence[str] = (),
) -> Any:
    """Return lm-eval's task of these examples.

    solved: those to show before a question; None: other ones of ``examples``.
    """
    parts = {"test": Dataset.from_list(examples.documents)}
    if solved is not None:
        parts["train"] = Dataset.from_list(solved.documents)

    def dataset(**_: object) -> DatasetDict:
        return DatasetDict(parts)

    config = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "fewshot_split": "test" if solved is None else "train",
        **_FORMS[examples.kind],
    }
    config["metric_list"] = [m for m in config["metric_list"] if m["metric"] not in skipped_metrics]
    if examples.kind == "answer":
        # A token has a byte or more, so a longer answer is wrong.
        answers = [text for document in examples.documents for text in document["answers"]]
        longest = max(len(text.encode()) for text in answers) + 1
        settings = {"until": ["\n"], "max_gen_toks": min(_MAX_ANSWER_TOKENS, longest)}
        config["generation_kwargs"] = settings
    return ConfigurableTask(config=config)


def _metrics(*names: str, is_loss: bool = False) -> list[dict[str, Any]]:
    aggregation = {"bits_per_byte": "bits_per_byte"} | {
        f"{unit}_perplexity": "weighted_perplexity" for unit in ("word", "byte")
    }
    return [
        {
            "metric": name,
            "aggregation": aggregation.get(name, "mean"),
            "higher_is_better": not is_loss,
        }
        for name in names
    ]


_FORMS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "target",
        "metric_list": _metrics("acc", "acc_norm"),
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answers",
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": _metrics("exact_match"),
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": _metrics(
            "bits_per_byte", "byte_perplexity", "word_perplexity", is_loss=True
        ),
    },
}
