"""`modtrain generate`: what comes out, where it goes, and what is refused."""

import contextlib
import json
import math
import os
import pty
import re
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer

from modtrain.cli.compose import compose
from modtrain.cli.main import main
from modtrain.common.errors import ConfigError, DataError
from modtrain.inference.generate.generate import decoder_config, generate
from modtrain.inference.loading import load_run
from modtrain.models.cache.cache import Cache


@pytest.fixture(scope="module")
def routed(start):
    return start("routed", "budget.steps=8", "model.capacity=0.5", "optimizer.lr=0.01")


def flags(run):
    place = (f"run={run.path.name}", f"runs_dir={run.path.parent}")
    return [*place, "accelerator=cpu", "max_tokens=12", "sampling.greedy=true"]


def asked(run, *overrides):
    return compose("generate", [*flags(run), *overrides])


def slowly(run, prompt: str, count: int) -> str:
    """The continuation by the whole text's forward pass for each token."""
    loaded = load_run(asked(run))
    tokenizer = Tokenizer.from_file(str(loaded.tokenizer))
    tokens = tokenizer.encode(prompt).ids or [tokenizer.token_to_id("<|endoftext|>")]
    generated = []
    for _ in range(count):
        with torch.no_grad():
            text = torch.tensor([[*tokens, *generated]])
            decision = loaded.model.config.causal_selections[0]
            logits = loaded.model(text, selection=decision).logits_BSV
        generated.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(generated)


@pytest.mark.parametrize(
    ("name", "prompt"), [("routed", "the old tree"), ("routed", ""), ("dense", "the")]
)
def test_the_text_is_what_the_model_generates(request, capsys, name, prompt):
    run = request.getfixturevalue(name)
    # What it prints where it is trained.
    capsys.readouterr()
    generate(asked(run, f"prompt='{prompt}'"))
    printed = capsys.readouterr()
    assert printed.out == slowly(run, prompt, 12) + "\n"
    assert "12 tokens after" in printed.err
    assert bool(re.search(r"routed: layer_\d\d \d", printed.err)) == (name == "routed")


def test_prompts_come_from_a_file_or_standard_input(routed, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("under the stone")
    generate(asked(routed, f"file={tmp_path}/prompt.txt", "echo=true"))
    by_file = capsys.readouterr().out
    with (tmp_path / "prompt.txt").open(encoding="utf-8") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        generate(asked(routed, "file=-", "echo=true"))
    assert capsys.readouterr().out == by_file
    assert by_file == "under the stone" + slowly(routed, "under the stone", 12) + "\n"


def test_a_stop_string_ends_the_text_before_it(routed, capsys):
    whole = slowly(routed, "the", 12)
    stop = whole[4:7]
    generate(asked(routed, "prompt=the", f"stop=['{stop}']"))
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


def test_depths_are_marked_where_there_are_no_colours(routed, capsys):
    generate(asked(routed, "prompt='the old'", "show_depth=true", "echo=true"))
    mark_depth = capsys.readouterr().out
    digits = "₀₁₂₃₄₅₆₇₈₉"
    plain = "".join(c for c in mark_depth if c not in digits)
    assert plain == "the old" + slowly(routed, "the old", 12) + "\n"
    assert any(digit in mark_depth for digit in digits)
    assert main(["generate", "--show-depth", *flags(routed), "prompt='the old'", "echo=true"]) == 0
    assert capsys.readouterr().out == mark_depth


def test_json_lines_keep_their_order_and_keys(routed, tmp_path):
    prompts = ["the river", "a", "", "stone walks under the old quiet tree", "and"]
    lines = [json.dumps({"prompt": text, "id": 10 * n}) for n, text in enumerate(prompts)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    paths = (f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl")
    generate(asked(routed, *paths, "batch_size=3", "show_depth=true"))
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == prompts
    assert [record["id"] for record in records] == [0, 10, 20, 30, 40]
    tokenizer = Tokenizer.from_file(str(load_run(asked(routed)).tokenizer))
    for record in records:
        assert record["completion"] == slowly(routed, record["prompt"], 12)
        assert (record["num_tokens"], record["finish"]) == (12, "length")
        given = max(1, len(tokenizer.encode(record["prompt"]).ids))
        assert len(record["depth"]) == given + 12
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_it_writes_it_reads(routed, tmp_path):
    """Ends of lines that JSON leaves as they are, and a mark of the encoding in front."""
    line = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "in.jsonl").write_text("\ufeff" + line + "\r\n", encoding="utf-8")
    generate(asked(routed, f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl"))
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert record["prompt"] == "a\u2028b\u0085c"


def test_a_file_that_is_no_text_is_named(routed, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match="latin: is not UTF-8"):
        generate(asked(routed, f"file={tmp_path}/latin"))


def test_a_line_end_stops_a_text_as_documented(routed):
    assert asked(routed, 'stop=["\n"]').stop == ["\n"]


def test_samples_differ_and_come_again_with_their_seed(routed, capsys):
    def run(*overrides):
        generate(asked(routed, "prompt=the", "sampling.greedy=false", *overrides))
        return capsys.readouterr().out

    both = run("samples=2")
    assert both == run("samples=2", "batch_size=1")
    first, second = re.fullmatch(r"--- 1 of 2\n(.*)\n--- 2 of 2\n(.*)\n", both, re.S).groups()
    assert first != second
    assert run() == first + "\n"
    assert run("sampling.seed=1") != first + "\n"


def test_self_speculation_prints_the_same(routed, capsys):
    generate(asked(routed, "prompt=the", "speculate.tokens=3"))
    printed = capsys.readouterr()
    assert printed.out == slowly(routed, "the", 12) + "\n"
    (passes,) = re.findall(r"([\d.]+) tokens per pass", printed.err)
    assert 1 <= float(passes) <= 4
    generate(asked(routed, "prompt=the", "speculate.tokens=2", "speculate.capacity=0.25"))
    assert capsys.readouterr().out == printed.out


def test_the_budget_changes_what_is_routed(routed, capsys):
    def shares(*overrides):
        generate(asked(routed, "prompt=the", "max_tokens=60", *overrides))
        err = capsys.readouterr().err
        return [float(share) for share in re.findall(r"layer_\d\d ([\d.]+)%", err)]

    assert max(shares("inference.step_cap=0")) == 0
    assert min(shares("inference.capacity=1")) == 100
    assert max(shares("inference.layer_cap=0.2", "inference.capacity=1")) <= 20


def test_a_model_without_a_causal_decision_is_refused(start):
    run = start("blind", "budget.steps=1", "model.router.causal=[]")
    with pytest.raises(ConfigError, match=r"router\.causal"):
        generate(asked(run))


def test_an_oracle_that_needs_the_whole_sequence_is_refused(start):
    router = ["model.router.score=oracle_norm", "model.router.causal=[predictor,threshold]"]
    run = start("oracle", "budget.steps=1", *router)
    generate(asked(run, "max_tokens=2"))
    with pytest.raises(ConfigError, match="whole sequence"):
        generate(asked(run, "inference.decision=threshold"))


def test_content_free_routers_keep_their_schedule(start):
    """In the middle of a schedule a checkpoint's shares are not those of its end."""
    schedule = ("capacity_schedule=linear", "capacity_schedule.end=0.8")
    run = start("rising", "budget.steps=6", "model.router.score=fixed", *schedule)
    config = asked(run, "step=4")
    loaded = load_run(config)
    settings = decoder_config(config, loaded, 0)
    assert settings.budget is None
    final = loaded.model.config.capacities
    routed = [capacity for capacity in final if capacity is not None]
    assert len(routed) == len(loaded.model.routers)
    for capacity, at_end in zip(settings.capacities, final, strict=True):
        assert (capacity is None) == (at_end is None)
        assert at_end is None or capacity != at_end
    # The positions that the model takes are those of these shares.
    cache = Cache(loaded.model.config, 1)
    tokens = torch.zeros(1, 40, dtype=torch.long)
    output = loaded.model.extend(tokens, cache, capacities=settings.capacities)
    for record, (layer, _) in zip(output.routing, loaded.model.config.routed_parts, strict=True):
        assert int(record.chosen_BS.sum()) == math.floor(settings.capacities[layer] * 40 + 1e-9)


_MISTAKES = {
    "routed": [
        (["prompt=a", "file=b.txt"], ["cannot be combined", "file", "is no file"]),
        (["prompt=a", "input=c.jsonl"], ["cannot be combined", "input", "is no file"]),
        (["samples=0", "max_tokens=0"], ["samples=0", "max_tokens=0", "1 or more"]),
        (["speculate.capacity=0.2"], ["speculate.capacity=0.2", "speculate.tokens"]),
        (["output=no/where/out.txt"], ["output=no/where/out.txt", "does not exist"]),
        (["output=/"], ["output=/", "is a directory"]),
        (["stop=['']"], ["stop", "empty"]),
        (["sampling.temperature=0"], ["sampling.temperature", "greedy"]),
        (["speculate.tokens=0", "speculate.capacity=2"], ["speculate.tokens", ".capacity=2"]),
        (["inference.layer_cap=0"], ["inference.layer_cap"]),
    ],
    "dense": [
        (["speculate.tokens=2"], ["speculate.tokens=2", "no", "depth routers"]),
        (["show_depth=true"], ["show_depth", "depth routers"]),
        (["inference.decision=threshold"], ["inference.decision=threshold", "causal"]),
        (["inference.capacity=0.5"], ["inference.capacity", "none"]),
    ],
}


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [(m, *case) for m, cases in _MISTAKES.items() for case in cases],
)
def test_every_mistake_is_reported_at_once(request, model, overrides, words):
    with pytest.raises(ConfigError) as caught:
        generate(asked(request.getfixturevalue(model), *overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": "\\ud800"}']
    + [json.dumps({"prompt": "a", key: 1}) for key in ("completion", "finish", "depth", "sample")],
)
def test_a_bad_line_is_named(routed, tmp_path, line):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"in\.jsonl, line 2"):
        generate(asked(routed, f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_terminal_gets_colours(routed, tmp_path):
    """In a pseudo-terminal depths are colours, and no digits."""
    command = [sys.executable, "-m", "modtrain", "generate", *flags(routed), "--show-depth"]
    ours, theirs = pty.openpty()
    look = {"env": {**os.environ, "TERM": "xterm-256color"}, "cwd": tmp_path}
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, **look) as done:
        os.close(theirs)
        output = b""
        # A closed terminal is an error to read from.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                output += part
    os.close(ours)
    assert done.returncode == 0
    assert b"\x1b[38;" in output
    assert "₁".encode() not in output
