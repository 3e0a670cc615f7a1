"""A trained run from Python: load it, and continue text."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from modtrain.common.errors import Problem, raise_if_any
from modtrain.data.prepare.tokenizer import parse_tokenizer
from modtrain.inference.config import SamplingConfig, TrainedRunConfig
from modtrain.inference.generate.continuations import Continuation
from modtrain.inference.generate.decoder import Decoder, DecoderConfig
from modtrain.inference.generate.text_stream import TextStream
from modtrain.inference.loading import load_run as load_configured_run
from modtrain.inference.token_text import Vocabulary
from modtrain.models.depth.config import ComputeBudget
from modtrain.models.transformer import Transformer

# Of models that a run was loaded as, which know no tokens' meaning.
_end_ids: WeakKeyDictionary[Transformer, int] = WeakKeyDictionary()


def load_run(
    path: str | PathLike[str], *, step: int | None = None, accelerator: str = "auto"
) -> tuple[Transformer, Tokenizer]:
    """Load the model, in evaluation mode, and the tokenizer of a training run.

    path: directory of the run, such as ``runs/my_run``. The prepared data that it was trained on
    has to be at the path that its configuration names. step: step of the checkpoint; None: the
    newest. accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Raises:
        ConfigError, CheckpointError, DataError: the run cannot be loaded, with the remedy.
    """
    folder = Path(path)
    config = TrainedRunConfig(folder.name, str(folder.parent), step, accelerator=accelerator)
    raise_if_any(config.problems())
    loaded = load_configured_run(config)
    _end_ids[loaded.model] = loaded.end_id
    return loaded.model, parse_tokenizer(loaded.tokenizer.read_bytes(), str(loaded.tokenizer))


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 128,
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    budget: ComputeBudget | None = None,
) -> str:
    """Return a continuation of ``prompt``, without the prompt.

    Tokens that skip a routed part are not computed there. The text ends after ``max_tokens``, at
    the end of the document, or before the first of the ``stop`` strings.

    A document ends with the token that ended those of the run, where `load_run` loaded the model;
    of another model, with the one that has a usual name in its tokenizer.

    prompt: empty: a new document. sampling: None: ``SamplingConfig()``, at temperature 1.
    budget: limits on what is computed; None: as trained.

    Raises:
        ConfigError: a setting is out of range. DataError: the tokenizer has no end-of-document
        token. ValueError: the model has no causal decision.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    problems = sampling.problems("sampling")
    if max_tokens < 1:
        problems.append(Problem("max_tokens", max_tokens, "is below 1", "give 1 or more"))
    raise_if_any(problems)
    selections = model.config.causal_selections
    if not selections:
        raise ValueError("the model was trained without a causal decision: router.causal=[]")
    vocabulary = Vocabulary(tokenizer.to_str().encode(), "the tokenizer", _end_ids.get(model))
    tokens = vocabulary.encode(prompt)
    config = DecoderConfig(
        selections[0],
        max_tokens=max_tokens,
        sampling=sampling,
        budget=budget,
        end_id=vocabulary.end_id,
    )
    decoder = Decoder(model, config, [tokens])
    continuation = Continuation({}, TextStream(tokenizer, stop, before=tokens))
    for event in decoder.run():
        if continuation.push(event):
            decoder.stop(event.number)
    return continuation.stream.text
