"""A trained run as a language model of lm-eval.

Imports lm-eval, of the extra ``modtrain[tasks]``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tokenizers import Tokenizer
from tqdm import tqdm

from modtrain.common.errors import ConfigError, DataError, Problem, raise_if_any
from modtrain.data.prepare.lost_text import LostText
from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.inference.calibration import budget_of_run, resolve_decisions
from modtrain.inference.config import ComputeBudgetConfig, SamplingConfig, TrainedRunConfig
from modtrain.inference.generate.continuations import Continuation
from modtrain.inference.generate.decoder import Decoder, DecoderConfig, Token
from modtrain.inference.generate.text_stream import TextStream
from modtrain.inference.loading import LoadedRun, load_run
from modtrain.inference.tasks.cost import ForwardCost
from modtrain.inference.tasks.scoring import Score, ScoringConfig, score
from modtrain.interop.prompt_format import PromptFormat
from modtrain.models.depth.config import ComputeBudget, Selection

# What lm-eval's model for Hugging Face generates where a task does not say.
_MAX_GENERATED = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_DEFAULT_BATCH = 16


class ModtrainLM(TemplateLM):
    """A run under one causal decision and compute budget.

    Texts are cut, split and encoded as lm-eval's model for Hugging Face does it, so the scores of
    an exported folder are the same.

    cost: counts what has been computed since it was set.
    """

    def __init__(
        self,
        loaded: LoadedRun,
        selection: Selection,
        budget: ComputeBudget | None = None,
        batch_size: int = _DEFAULT_BATCH,
    ) -> None:
        super().__init__()
        self.loaded, self.batch_size = loaded, batch_size
        self._device, self._is_silent = loaded.device, False
        self._bpe: Tokenizer = parse_tokenizer(loaded.tokenizer.read_bytes(), str(loaded.tokenizer))
        self._lost_text = LostText(self._bpe, str(loaded.tokenizer))
        self._format = PromptFormat.read(loaded.directory.path)
        self.cost = ForwardCost(loaded.trained.model, selection)
        self.set_decision(selection, budget)

    def set_decision(self, selection: Selection, budget: ComputeBudget | None) -> None:
        """Take another causal decision or compute budget, and count anew what is computed."""
        self._scoring = ScoringConfig(
            selection,
            self.max_length,
            budget,
            self.batch_size,
            self.loaded.capacities,
            self.loaded.end_id if self._masks_documents else None,
        )
        self.cost = ForwardCost(self.loaded.trained.model, selection)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> ModtrainLM:
        """Load the run that ``lm_eval --model_args`` names; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> ModtrainLM:
        """Load a run.

        arg_dict: ``run``, its directory; keys of `TrainedRunConfig`, such as ``step``; and those of
        ``inference.…``, such as ``decision`` and ``capacity``. additional_config: lm-eval's own
        options ``batch_size`` and ``device``.

        Raises:
            ConfigError: an argument is not known, or wrong.
        """
        options = {**arg_dict, **(additional_config or {})}
        options.pop("max_batch_size", None)
        batch_size = options.pop("batch_size", None) or _DEFAULT_BATCH
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            reason, remedy = "is no number", "give how many texts to compute at once, such as 16"
            raise ConfigError([Problem("batch_size", batch_size, reason, remedy)])
        device = options.pop("device", None)
        if device is not None:
            options["accelerator"] = str(device).partition(":")[0]
        config, settings = _configs(options)
        loaded = load_run(config)
        selection = resolve_decisions(settings, loaded.trained.model, "")[0]
        budget = budget_of_run(loaded, selection, settings, int(batch_size), "")
        return cls(loaded, selection, budget, int(batch_size))

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.loaded.end_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text without a context."""
        return self._format.begin_ids[0] if self._format.begin_ids else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.loaded.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return min(_MAX_GENERATED, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's file, for lm-eval's cache of requests."""
        return str(self.loaded.tokenizer).replace("/", "__")

    @property
    def _masks_documents(self) -> bool:
        return self.loaded.trained.data.eos_id is not None

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes about the model."""
        return {
            "run": str(self.loaded.directory.path),
            "step": self.loaded.step,
            "decision": self._scoring.selection,
            "compute_budget": None if self._scoring.budget is None else [*self._scoring.budget],
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_unused: object
    ) -> list[int]:
        """Return the tokens of a text, after those that begin a text of this model.

        Raises:
            DataError: the tokenizer cannot spell it.
        """
        if lost := self._lost_text.of(string):
            raise DataError(f"a text of the task: {lost}")
        begin = list(self._format.begin_ids)
        first = self._bpe.decode(begin[:1], skip_special_tokens=False) if begin else None
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, first)
        tokens: list[int] = self._bpe.encode(string, add_special_tokens=False).ids
        return begin + tokens if add_special_tokens else tokens

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's chat template writes it.

        Raises:
            ConfigError: the model has no template. DataError: the template does not take it.
        """
        if self._format.chat_template is None:
            reason, remedy = "needs a chat template, and the run has none", "import a chat model"
            raise ConfigError([Problem("task.chat", "true", reason, remedy)])
        return self._format.chat_text(self._bpe, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the model's chat template, if one is asked for."""
        return self._format.chat_template if chat_template else None

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation, and whether it is the likeliest text."""
        # Without a bar for the encoding, which takes an instant.
        self._is_silent = disable_tqdm
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        **_unused: object,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self._score(pairs, "scoring", self._is_silent)
        answers = [(float(s.log_probability), s.is_greedy) for s in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts or (), answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log probability of each text, in nats, read in windows of the full length."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [make_disjoint_window(part) for part in parts]
            counts.append(len(windows) - before)
        scores = iter(self._score(windows, "reading texts", disable_tqdm))
        totals = [sum(next(scores).log_probability for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], what: str, is_silent: bool
    ) -> list[Score]:
        try:
            with self._bar(len(pairs), what, is_silent) as bar, self.loaded.autocast():
                return score(self.loaded.model, pairs, self._scoring, self.cost, bar.update)
        except ValueError as error:
            raise DataError(f"a request of the task: {error}") from error

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to a stop string.

        Raises:
            DataError: a task's ``generation_kwargs`` cannot be followed.
        """
        by_settings: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(number)
        texts: dict[int, str] = {}
        with self._bar(len(requests), "generating", disable_tqdm) as bar:
            for numbers in by_settings.values():
                contexts = [requests[number].args[0] for number in numbers]
                made = self._generate(contexts, requests[numbers[0]].args[1], bar)
                texts |= dict(zip(numbers, made, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: list[str], kwargs: Mapping[str, Any], bar: Any) -> list[str]:
        settings = dict(normalize_gen_kwargs(dict(kwargs), self.max_gen_toks))
        max_tokens, sampling = settings.pop("max_gen_toks"), _sampling(settings)
        eos = self._bpe.decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(settings.pop("until"), eos=eos)
        longest = self.max_length - max_tokens
        if longest < 1:
            raise DataError(
                f"a task generates {max_tokens} tokens, and the model reads {self.max_length} in"
                " all: lower its generation_kwargs.max_gen_toks"
            )
        begin = [self.prefix_token_id]
        prompts = [(self.tok_encode(text) or begin)[-longest:] for text in contexts]
        # The longest first, so that what does not fit into memory fails at once.
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        made = self._decode([prompts[number] for number in order], max_tokens, sampling, stop, bar)
        tokens = dict(zip(order, made, strict=True))
        return [
            postprocess_generated_text(
                self._bpe.decode(tokens[number], skip_special_tokens=True), stop, None
            )
            for number in range(len(prompts))
        ]

    def _decode(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: SamplingConfig,
        stop: Sequence[str],
        bar: Any,
    ) -> list[list[int]]:
        """Return the tokens that continue each prompt, up to one that completes a stop string."""
        scoring = self._scoring
        config = DecoderConfig(
            scoring.selection,
            max_tokens=max_tokens,
            sampling=sampling,
            budget=scoring.budget,
            batch_size=self.batch_size,
            # The whole prompt at once, so that all of it is counted.
            prefill_chunk=self.max_length,
            end_id=self.eot_token_id,
            more_end_ids=self._format.end_ids,
            mask_documents=self._masks_documents,
            capacities=scoring.capacities,
        )
        decoder = Decoder(self.loaded.model, config, prompts)
        stops = [text for text in stop if text]
        continuations = [
            Continuation({}, TextStream(self._bpe, stops, before=prompt)) for prompt in prompts
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        handles = self.cost.watch_experts(self.loaded.model)
        try:
            with self.loaded.autocast():
                for event in decoder.run():
                    if isinstance(event, Token):
                        tokens[event.number].append(event.id)
                    if continuations[event.number].push(event):
                        decoder.stop(event.number)
                    if continuations[event.number].finish is not None:
                        bar.update(1)
        finally:
            for handle in handles:
                handle.remove()
        for sequence in decoder.statistics.by_sequence:
            self.cost.add(sequence.tokens, sequence.chosen_R)
        return tokens

    @staticmethod
    def _bar(total: int, what: str, is_silent: bool) -> Any:
        return tqdm(total=total, desc=what, disable=is_silent or not sys.stderr.isatty())


def _configs(options: Mapping[str, Any]) -> tuple[TrainedRunConfig, ComputeBudgetConfig]:
    """Return the run and its compute budget. Raises ConfigError for what is not known, or wrong."""
    run_keys = {f.name for f in fields(TrainedRunConfig)} - {"runs_dir"}
    budget_keys = {f.name for f in fields(ComputeBudgetConfig)}
    unknown = [key for key in options if key not in run_keys | budget_keys]
    remedy = f"use {', '.join(sorted(run_keys | budget_keys))}"
    raise_if_any([Problem(key, options[key], "is not known", remedy) for key in unknown])
    path = Path(str(options.get("run") or ""))
    values = {key: value for key, value in options.items() if key in run_keys}
    values |= {"run": path.name, "runs_dir": str(path.parent)}
    config = TrainedRunConfig(**values)
    settings = ComputeBudgetConfig(**{k: v for k, v in options.items() if k in budget_keys})
    raise_if_any([*config.problems(), *settings.problems("")])
    return config, settings


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    """Take what concerns sampling out of a task's settings.

    Raises:
        DataError: something is left that generation does not know.
    """
    is_sampled = bool(settings.pop("do_sample", False))
    values = {key: settings.pop(key) for key in _SAMPLING if key in settings}
    if unknown := sorted(settings.keys() - {"until"}):
        raise DataError(
            f"a task's generation_kwargs have {', '.join(unknown)}, which modtrain does not take:"
            f" it takes until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
        )
    if not is_sampled:
        values = {key: value for key, value in values.items() if key == "repetition_penalty"}
    config = SamplingConfig(greedy=not is_sampled, **values)
    raise_if_any(config.problems("generation_kwargs"))
    return config


def register() -> None:
    """Make the model known to lm-eval as ``modtrain``; a second time changes nothing."""
    from lm_eval.api.registry import model_registry  # noqa: PLC0415

    if "modtrain" not in model_registry:
        model_registry.register("modtrain", target=ModtrainLM)
