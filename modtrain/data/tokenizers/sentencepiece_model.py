"""A SentencePiece model as a ``tokenizer.json`` (Kudo and Richardson 2018, arXiv 1808.06226).

The numbers are those of SentencePiece. Only where a unigram model has several cuts of a text that
are equally likely, to the 32 bits in which SentencePiece adds up, it may be another one of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from modtrain.common.errors import DataError
from modtrain.data.tokenizers.comparison import refuse_other_numbers

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_TYPES = {3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
# All ways to cut a piece in two are tried.
_LONGEST_PIECE = 256
# Below the rarest piece; what the library takes off for a character that is unknown.
_UNKNOWN_PENALTY = 10.0
# Of a sum of 32 bits.
_ROUNDING = 2.0**-23


def convert(content: bytes, name: str) -> tuple[bytes, str | None]:
    """Return the ``tokenizer.json`` of a model, and the token that ends a text; None without one.

    Raises DataError where it is no model, or one that would give other numbers.
    """
    model = _parsed(content, name)
    if reason := _not_supported(model):
        raise DataError(
            f"{name}: this SentencePiece model cannot be converted exactly: {reason}. Name a"
            " tokenizer.json instead, which decides for itself: transformers'"
            " AutoTokenizer.from_pretrained(...).save_pretrained('tokenizer')"
        )
    tokenizer = Tokenizer(_unigram(model) if _is_unigram(model) else _bpe(model))
    tokenizer.normalizer = _normalizer(model)
    if (splitter := _pre_tokenizer(model)) is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = _decoder(model)
    for piece in model.pieces:
        if piece.type in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER_DEFINED:
            # Found behind the normalizer, as the model's own are.
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=True, special=False)])
    _compare(tokenizer, content, model, name)
    end = model.trainer_spec.eos_id
    has_end = 0 <= end < len(model.pieces) and model.pieces[end].type == _CONTROL
    return tokenizer.to_str().encode(), model.pieces[end].piece if has_end else None


def _parsed(content: bytes, name: str) -> Any:
    try:
        from google.protobuf.message import DecodeError  # noqa: PLC0415
        from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415
    except ImportError as error:
        raise DataError(
            f"{name}: is a SentencePiece model, and {error.name} is not installed: pip install"
            " 'modtrain[tokenizers]'"
        ) from None
    # Its classes are made when it is imported.
    made: Any = sentencepiece_model_pb2
    model = made.ModelProto()
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError) as error:
        raise DataError(f"{name}: is no SentencePiece model ({error})") from None
    if not model.pieces:
        raise DataError(f"{name}: is no SentencePiece model: it has no pieces")
    return model


def _is_unigram(model: Any) -> bool:
    return bool(model.trainer_spec.model_type == _UNIGRAM)


def _not_supported(model: Any) -> str:
    """Return what of a model a ``tokenizer.json`` cannot say; empty: nothing."""
    names = Counter(piece.piece for piece in model.pieces)
    piece, count = names.most_common(1)[0]
    if count > 1 or "" in names or max(map(len, names)) > _LONGEST_PIECE:
        return (
            f"its pieces are not each of 1 to {_LONGEST_PIECE} characters, and there once: one is"
            f" there {count} times ({piece[:_LONGEST_PIECE]!r})"
        )
    return _other_rules(model) or _other_pieces(model) or _unsafe_scores(model)


def _other_rules(model: Any) -> str:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        return f"its type is {_TYPES.get(trainer.model_type, trainer.model_type)}"
    if normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap:
        rules = normalizer.name or "a table of its own"
        return f"it replaces characters by the rules {rules}; identity alone can be"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "it treats spaces in another way than as the beginning of a word"
    return ""


def _other_pieces(model: Any) -> str:
    normalizer, types = model.normalizer_spec, {piece.type for piece in model.pieces}
    if _UNUSED in types:
        return "it has pieces that are marked as unused"
    if _USER_DEFINED in types and (
        _is_unigram(model) or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    ):
        return (
            "it has symbols of the user's, and is a unigram model, begins texts with a space, or"
            " removes spaces"
        )
    return ""


def _unsafe_scores(model: Any) -> str:
    """Return what would make another choice among pieces than the library's; empty: nothing."""
    normal = [piece for piece in model.pieces if piece.type == _NORMAL]
    if not normal or not all(math.isfinite(piece.score) for piece in model.pieces):
        return "it has no pieces of text, or one whose score is no number"
    if not _is_unigram(model):
        scores = Counter(piece.score for piece in normal if len(piece.piece) > 1)
        if scores and (most := scores.most_common(1)[0])[1] > 1:
            return f"{most[1]} of its pieces have the same score, {most[0]:g}"
        return ""
    known = {piece.piece for piece in normal}
    if missing := sorted({c for piece in normal for c in piece.piece} - known):
        # It would be weighed in another way.
        return f"the character {missing[0]!r} of its pieces is no piece by itself"
    names = [piece.piece for piece in model.pieces if piece.type != _NORMAL]
    if wrong := [name for name in names if _cut(name, known) is None]:
        return f"the text {wrong[0]!r} could not be told from the token of that name"
    return ""


def _cut(name: str, known: set[str]) -> int | None:
    """Return where a text that spells the name of a control token or a byte can be cut.

    That is between an unknown character and a known one, which no piece crosses; 0 where all are
    known, and together likelier than the name; None where there is no such place.
    """
    is_known = [character in known for character in name]
    places = [n for n in range(1, len(name)) if is_known[n - 1] != is_known[n]]
    return 0 if all(is_known) else next(iter(places), None)


def _pre_tokenizer(model: Any) -> pre_tokenizers.PreTokenizer | None:
    """Cut a text in a unigram model so that no token's name is found in it as a piece."""
    if not _is_unigram(model):
        return None
    known = {piece.piece for piece in model.pieces if piece.type == _NORMAL}
    names = [piece.piece for piece in model.pieces if piece.type != _NORMAL]
    cuts = [(name, cut) for name in names if (cut := _cut(name, known))]
    if not cuts:
        return None
    parts = (rf"(?<={re.escape(name[:cut])})(?={re.escape(name[cut:])})" for name, cut in cuts)
    return pre_tokenizers.Split(Regex("|".join(parts)), "isolated")


def _unigram(model: Any) -> models.Model:
    least = min(piece.score for piece in model.pieces if piece.type == _NORMAL)
    longest = max(len(piece.piece) for piece in model.pieces)
    # Its name in a text is spelled by other pieces, each of them more likely.
    never = (min(least, 0.0) - _UNKNOWN_PENALTY) * (longest + 1)
    scores = [
        (piece.piece, piece.score if piece.type == _NORMAL else never) for piece in model.pieces
    ]
    unknown = next((n for n, p in enumerate(model.pieces) if p.type == _UNKNOWN), None)
    return models.Unigram(scores, unknown, model.trainer_spec.byte_fallback)


def _bpe(model: Any) -> models.Model:
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, cut, left, right))
    unknown = next((p.piece for p in model.pieces if p.type == _UNKNOWN), None)
    return models.BPE(
        vocabulary,
        [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _normalizer(model: Any) -> normalizers.Normalizer:
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        # Behind the others, for a sign that looks like one of its spaces is removed as well.
        steps.append(normalizers.Replace(Regex(rf"{_SPACE}+\z"), ""))
    return normalizers.Sequence(steps)


def _decoder(model: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _compare(tokenizer: Tokenizer, content: bytes, model: Any, name: str) -> None:
    from sentencepiece import SentencePieceProcessor  # noqa: PLC0415

    try:
        original = SentencePieceProcessor(model_proto=content)
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{name}: SentencePiece does not read it ({error})") from None
    scores = [piece.score for piece in model.pieces]

    def is_tie(one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether two cuts are equally likely to the 32 bits in which SentencePiece adds up."""
        both = [math.fsum(scores[number] for number in cut) for cut in (one, other)]
        rounding = _ROUNDING * max(len(one), len(other)) * max(1.0, *map(abs, both))
        return tokenizer.decode(one) == tokenizer.decode(other) and (
            abs(both[0] - both[1]) <= rounding
        )

    texts = [piece.piece.replace(_SPACE, " ") for piece in model.pieces]
    options = {"is_tie": is_tie} if _is_unigram(model) else {}
    refuse_other_numbers(tokenizer, original.encode, texts, name, **options)
