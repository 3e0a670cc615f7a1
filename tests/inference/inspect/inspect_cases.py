"""Small models, and their parsed pages, that the tests of the inspection share."""

from contextlib import nullcontext
from html.parser import HTMLParser

from modtrain.inference.inspect.figures import luminance
from modtrain.inference.inspect.inspect import text_windows
from modtrain.inference.inspect.page import Subject, render
from modtrain.inference.inspect.trace import Trace, trace
from modtrain.inference.token_text import TokenTexts
from modtrain.models.depth.config import RouterConfig
from modtrain.models.experts.config import ExpertsConfig
from tests.helpers.model_cases import lively, settle, small

EVERY = ["predictor", "auxiliary", "threshold"]
SEQ_LEN = 16
NASTY = (
    "<script>alert(1)</script> \"quoted\" &amp; 'single'\r\n\n\ttab  two  spaces \u00a0\u200b\u202e"
    " caf\u00e9 \u20ac \U0001f469\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd e\u0301"
)


def router(**changes) -> RouterConfig:
    return RouterConfig(**({"predictor_dim": 8} | changes))


def experts(**changes) -> ExpertsConfig:
    return ExpertsConfig(**({"count": 3, "dim": 8, "noop": 2} | changes))


KINDS = {
    "mod": {"router": router(causal=EVERY)},
    "both parts": {"router": router(causal=EVERY, target="both")},
    "token choice": {"router": router(choice="token")},
    "fixed": {"router": router(score="fixed")},
    "dense": {"pattern": "dense"},
    "integrated": {"pattern": "dense", "experts": experts()},
    "staged": {"router": router(causal=EVERY), "experts": experts(noop=0)},
    "expert choice": {"pattern": "dense", "experts": experts(choice="expert")},
}


def model_of(kind: str, **changes):
    model = settle(lively(small(**(KINDS[kind] | changes))), SEQ_LEN)
    return model.eval()


def windows_of(tokens, batch_size=2):
    return list(text_windows(tokens, SEQ_LEN, batch_size))


def traced(model, tokens, selection, batch_size=2) -> Trace:
    return trace(model, windows_of(tokens, batch_size), selection, nullcontext())


def contrast(one: str, two: str) -> float:
    low, high = sorted([luminance(one), luminance(two)])
    return (high + 0.05) / (low + 0.05)


class Parsed(HTMLParser):
    """Checks that tags nest, and keeps tags, attributes and the text of the token view."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self.words: list[str] = []
        self.inside = False
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append((tag, attributes))
        if tag == "span" and self.inside:
            self.tokens.append("")
        if attributes.get("class") == "text":
            self.inside = True
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "div":
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            assert self.open[-1] == "span", repr(data)
            self.tokens[-1] += data
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self):
        return [attributes["id"] for attributes in self.all("section")]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def subject(model, selection, **changes) -> Subject:
    values = {
        "run": "a <b>run</b>",
        "step": 12345,
        "source": "<script>source.txt",
        "seq_len": SEQ_LEN,
        "selection": selection,
        "budget": "",
        "is_causal": selection != "top_k",
        "num_layers": model.config.num_layers,
        "capacities": [0.25] * len(model.routers),
    }
    return Subject(**(values | changes))


def page_of(kind, selection, content, tokenizer, tokens_shown=2000):
    model = model_of(kind, vocab_size=tokenizer.get_vocab_size())
    ids = tokenizer.encode(content).ids
    trace = traced(model, ids, selection, batch_size=64)
    pieces = TokenTexts(tokenizer).pieces(ids)
    return trace, pieces, render(subject(model, selection), trace, pieces, tokens_shown)
