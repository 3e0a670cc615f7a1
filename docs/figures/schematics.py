"""Figures that need no run: the packages from their real imports, and the ways through them."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import grimp
from charts import results_chart
from drawing import Drawing, flow
from fits import fit_chart
from pattern_rungs import search_chart

ROOT = Path(__file__).parents[2]


def draw_all(folder: Path) -> None:
    """Write every schematic figure, light and dark, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().save(folder, name)
    results_chart(folder)
    fit_chart(folder)
    search_chart(folder)


# Where a package stands in its row of the import contract: 0 left, 1 middle, 2 right.
_COLUMNS = {"inference": 0, "cluster": 2, "parallel": 2, "checkpoint": 2, "evaluation": 0}
_COLUMNS |= {"distributed": 2, "data": 0, "models": 1}
_SUMMARIES = 24


def packages() -> Drawing:
    """Draw the packages in the rows of the import contract, with the imports between them."""
    rows = _contract_rows()
    places = {}
    for number, row in enumerate(rows):
        for name in row:
            taken = [column for other, (line, column) in places.items() if line == number]
            free = next(c for c in (_COLUMNS.get(name, 1), 1, 0, 2) if c not in taken)
            places[name] = (number, free)
    height, gap, width = 78, 28, 170
    drawing = Drawing(
        540,
        len(rows) * (height + gap) - gap + 4,
        "The packages of modtrain in layers; imports point down only.",
    )

    def corner(name: str) -> tuple[float, float]:
        line, column = places[name]
        return 2 + column * (width + 13), 2 + line * (height + gap)

    for above, below in sorted(_edges(list(places))):
        (x0, y0), (x1, y1) = corner(above), corner(below)
        lean = (x1 > x0) - (x1 < x0)
        if below == rows[-1][0]:
            x1, lean = x0, 0  # the last row is as wide as the drawing
        start = (x0 + width * (0.5 + 0.3 * lean), y0 + height)
        drawing.arrow(start, (x1 + width * (0.5 - 0.3 * lean), y1 - 1))
    for name in places:
        x, y = corner(name)
        if name == rows[-1][0]:
            drawing.box(2, y, 536, height, name, _summary(name), "plain", 3 * _SUMMARIES)
            continue
        kind = "blue" if name == "models" else "plain"
        drawing.box(x, y, width, height, name, _summary(name), kind, _SUMMARIES)
    return drawing


def _contract_rows() -> list[list[str]]:
    """Return the packages of each layer, as pyproject.toml's import contract names them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [[part.strip(" ()") for part in layer.split("|")] for layer in layers]
    short = [[name.removeprefix("modtrain.") for name in row] for row in names]
    return [[name for name in row if (ROOT / "modtrain" / name).is_dir()] for row in short]


def _edges(names: list[str]) -> set[tuple[str, str]]:
    """Return which package imports which, less what follows from the others."""
    graph = grimp.build_graph("modtrain", cache_dir=None)
    direct = {
        above: {
            below
            for below in names
            if below != above
            and graph.direct_import_exists(
                importer=f"modtrain.{above}", imported=f"modtrain.{below}", as_packages=True
            )
        }
        for above in names
    }

    def reached(name: str) -> set[str]:
        return set().union(*({below} | reached(below) for below in direct[name]), set())

    return {
        (above, below)
        for above in names
        for below in direct[above]
        if not any(below in reached(other) for other in direct[above] - {below})
    }


def _summary(package: str) -> str:
    text = ast.get_docstring(ast.parse((ROOT / "modtrain" / package / "__init__.py").read_text()))
    first = (text or "").split("\n")[0].split(":")[0]
    return first.removesuffix(".")


def batch() -> Drawing:
    """The way of a batch: from text to an optimizer step."""
    drawing = Drawing(540, 768, "The way of a batch, from text files to an optimizer step.")
    steps = [
        ("text files", "txt, jsonl, parquet", "plain"),
        ("modtrain prepare", "tokenizer, encode, pack: WebDataset shards and index.json", "plain"),
        ("one global order", "a keyed permutation of (seed, epoch): sample n of the run", "blue"),
        ("samplers", "step, micro-batch and data-parallel rank pick their samples", "blue"),
        ("batch", "inputs and targets (B, S), document numbers where masked", "plain"),
        ("Transformer", "routed blocks compute k of S tokens", "orange"),
        ("loss in chunks", "language modelling + predictor + balance losses", "plain"),
        ("backward, clip, spike check", "trunk and predictors are clipped apart", "plain"),
        ("optimizer step", "FLOPs, tokens and samples count up; metrics are recorded", "green"),
    ]
    tops = flow(drawing, steps, 40, 460, 2)
    drawing.arrow(
        (500, tops[8] + 29), (526, tops[8] + 29), (526, tops[2] + 29), (502, tops[2] + 29)
    )
    drawing.text(518, tops[5] - 8, "next step", "muted", 12.5, "end")
    return drawing


def checkpoint() -> Drawing:
    """The way of a checkpoint: written beside training, read back on any number of ranks."""
    drawing = Drawing(540, 786, "The way of a checkpoint: a save, and a start that reads it.")
    drawing.text(110, 16, "a save", "ink", 15, bold=True)
    drawing.text(430, 16, "a start", "ink", 15, bold=True)
    save = [
        ("step boundary", "every n steps, or a signal", "plain"),
        ("copy to the host", "each rank's tensors; training goes on", "blue"),
        (".writing-step-n", "a thread on each rank writes its pieces by name", "plain"),
        ("flush", "files and checksums of every rank", "plain"),
        ("manifest.json", "rank 0: sizes and SHA-256 of each file", "plain"),
        ("rename to step-n", "the checkpoint is there, whole", "green"),
        ("prune", "older ones go, but for keep_last and keep_every", "plain"),
    ]
    read = [
        ("list checkpoints/", "rank 0, newest first", "plain"),
        ("read every byte", "the ranks share the files", "blue"),
        ("whole?", "one rank's problem is all ranks' answer", "orange"),
        ("load by name", "each rank takes its pieces, whatever the layout was", "plain"),
        ("random states", "same number of ranks: exact; else from seed, step, rank", "plain"),
        ("drop later records", "each step stands in metrics.jsonl once", "plain"),
        ("next step", "same samples in the same order", "green"),
    ]
    flow(drawing, save, 2, 216, 28, 84, 26, 29)
    tops = flow(drawing, read, 322, 216, 28, 84, 26, 29)
    y, start = tops[2] + 41, tops[0] + 41
    drawing.arrow((322, y), (308, y), (308, start), (320, start), colour="orange", dashed=True)
    for line, words in enumerate(("no: keep it", "as damaged,", "take the one", "before")):
        drawing.text(303, tops[1] + 30 + line * 16, words, "orange", 12, "end")
    drawing.text(438, tops[3] - 8, "yes", "muted", 12.5, "start")
    return drawing


def token() -> Drawing:
    """The way of a token in cached decoding: each routed part decides before it computes."""
    drawing = Drawing(540, 572, "The way of one token through cached decoding.")
    x, width = 170, 250
    middle = x + width / 2
    drawing.box(x, 2, width, 50, "token t", "embedding of the last token", "plain", 60)
    blocks = [
        (True, "block 0, dense", 8),
        (False, "block 1, routed", 2),
        (True, "block 2, dense", 8),
        (False, "block 3, routed", 3),
    ]
    top, gap = 86, 108
    drawing.arrow((middle, 52), (middle, top - 1))
    for dense, name, kept in blocks:
        about = "reads and appends key, value" if dense else "value above its level?"
        drawing.box(x, top, width, 54, name, about, "plain" if dense else "orange", 60)
        drawing.text(430, top + 18, "its cache", "muted", 12, "start")
        for entry in range(kept):
            drawing.cell(430 + entry * 13, top + 26, 11, "blue", 0.75)
        if not dense:
            end = top + gap - 22
            drawing.arrow(
                (x, top + 27), (x - 24, top + 27), (x - 24, end), (middle - 5, end), dashed=True
            )
            for line, words in enumerate(("no: it passes by,", "nothing computed,", "no cache")):
                drawing.text(x - 32, top + 34 + line * 16, words, "muted", 12, "end")
            drawing.text(middle + 8, top + 72, "yes: computed", "muted", 12.5, "start")
        drawing.arrow((middle, top + 54), (middle, top + gap - 1))
        top += gap
    drawing.box(x, top, width, 46, "norm, head, sampling", "", "green")
    drawing.arrow((x, top + 23), (14, top + 23), (14, 27), (x - 2, 27))
    drawing.text(24, 20, "token t + 1", "muted", 12.5, "start")
    return drawing


def routed_block() -> Drawing:
    """A routed block: who is chosen, what is computed, what is added."""
    drawing = Drawing(540, 530, "A routed block: the router picks tokens, the others pass by.")
    chosen = {2: 224, 5: 352}  # token: where its arrow meets f
    scores = ["-0.3", "0.2", "1.2", "-0.8", "0.4", "0.9", "-0.1", "0.1"]
    left, step = 74, 58
    for y, label in ((34, "x"), (104, "r = w · x"), (454, "x'")):
        drawing.text(4, y, label, "ink", 14, "start", bold=True)
    for number, score in enumerate(scores):
        x, taken = left + number * step, number in chosen
        kind, line = ("orange", "orange") if taken else ("plain", "line")
        middle = x + 22
        drawing.box(x, 8, 44, 40, str(number), "", kind)
        drawing.arrow((middle, 48), (middle, 84), colour=line)
        drawing.text(middle, 104, score, "orange" if taken else "muted", 13.5, bold=taken)
        drawing.box(x, 428, 44, 40, f"{number}'" if taken else str(number), "", kind)
        if not taken:
            drawing.arrow((middle, 144), (middle, 426), dashed=True)
            continue
        meets = chosen[number]
        drawing.arrow((middle, 144), (middle, 176), (meets, 202), (meets, 219), colour="orange")
        drawing.arrow((meets, 296), (meets, 352), (middle, 386), (middle, 426), colour="orange")
        side, anchor = (8, "start") if number == 2 else (-8, "end")
        drawing.text(meets + side, 332, f"r = {score}", "orange", 13.5, anchor, bold=True)
        drawing.text(middle + side, 412, "plus x", "orange", 13.5, anchor, bold=True)
    drawing.text(306, 134, "the k = capacity · S largest scores of a sequence", "muted", 13)
    about = "attention and MLP among the chosen, at their true positions"
    drawing.box(190, 220, 196, 76, "f", about, "blue", 30)
    drawing.text(288, 496, "chosen:  x' = x + r · f(X)", "orange", 14.5)
    drawing.text(288, 518, "others:  x' = x, bit for bit", "ink", 14.5)
    return drawing


def patterns() -> Drawing:
    """The capacity of each layer under each pattern, from the code that resolves them."""
    from modtrain.models.depth.pattern import layer_capacities

    names = ("dense", "every", "every_other", "all_but_ends", "cosine", "ramp_down", "ramp_up")
    names += ("u_shape",)
    layers = 12
    drawing = Drawing(540, 30 + len(names) * 36 + 10, "Which share of the tokens each layer takes.")
    for number in range(layers):
        drawing.text(146 + number * 32, 18, str(number), "muted", 12.5)
    for row, name in enumerate(names):
        y = 30 + row * 36
        drawing.text(4, y + 20, name, "ink", 14, "start")
        for number, capacity in enumerate(layer_capacities(name, 0.125, layers)):
            drawing.cell(132 + number * 32, y, 28, "blue", 0.12)
            share = 1.0 if capacity is None else float(capacity)
            fill = share * 28
            drawing.parts.append(
                f'<rect x="{132 + number * 32}" y="{y + 28 - fill:g}" width="28"'
                f' height="{fill:g}" rx="2" fill="{{blue}}" fill-opacity="0.8"/>'
            )
    return drawing


def mesh() -> Drawing:
    """What eight ranks share under fsdp with tensor and context parallelism of two."""
    drawing = Drawing(
        540, 430, "Eight ranks: sharded by two, tensor parallel by two, context parallel by two."
    )
    drawing.text(270, 18, "strategy=fsdp strategy.tensor_parallel=2", "ink", 14.5, bold=True)
    drawing.text(270, 38, "strategy.context_parallel=2, on 8 ranks", "ink", 14.5, bold=True)
    kinds = ("blue", "orange")
    for shard in range(2):
        x = 6 + shard * 270
        drawing.box(x, 54, 258, 318, "", "", "plain")
        drawing.text(x + 129, 76, f"shard {shard}: its own samples", "ink", 13, bold=True)
        for context in range(2):
            y = 92 + context * 138
            drawing.text(
                x + 129, y + 10, f"context {context}: half of each sequence", "muted", 12.5
            )
            for tensor in range(2):
                rank = shard * 4 + context * 2 + tensor
                drawing.box(
                    x + 10 + tensor * 121,
                    y + 20,
                    117,
                    98,
                    f"rank {rank}",
                    f"tensor {tensor}: half of each layer's products",
                    kinds[tensor],
                    16,
                )
    drawing.text(
        270, 396, "FSDP shards parameters over the four shard and context ranks;", "muted", 13
    )
    drawing.text(
        270, 416, "tensor ranks are neighbours, and share each matrix of a layer.", "muted", 13
    )
    return drawing


def order() -> Drawing:
    """One global order of samples, dealt out to steps, micro-batches and ranks."""
    drawing = Drawing(540, 330, "Samples in one global order, for one rank and for two.")
    drawing.text(
        4,
        20,
        "the stream: sample numbers after the keyed permutation",
        "ink",
        14,
        "start",
        bold=True,
    )
    samples = ("71", "3", "40", "18", "92", "55", "7", "26")
    for number, name in enumerate(samples):
        drawing.box(6 + number * 66, 32, 58, 36, name, "", "blue" if number < 4 else "orange")
    drawing.text(136, 88, "step 0", "blue", 13.5, bold=True)
    drawing.text(400, 88, "step 1", "orange", 13.5, bold=True)
    for row, (title, parts) in enumerate(
        (
            ("1 rank, 2 micro-batches a step", (("micro 0", 0, 2), ("micro 1", 2, 4))),
            ("2 ranks, 1 micro-batch a step", (("rank 0", 0, 2), ("rank 1", 2, 4))),
        )
    ):
        y = 122 + row * 106
        drawing.text(4, y, title, "ink", 14, "start", bold=True)
        for step, kind in ((0, "blue"), (4, "orange")):
            for name, start, stop in parts:
                x = 6 + (step + start) * 66
                width = (stop - start) * 66 - 8
                drawing.box(
                    x, y + 12, width, 52, name, " ".join(samples[step + start : step + stop]), kind
                )
    drawing.text(
        4,
        318,
        "Position = step * sequences a step: one integer, on any number of ranks.",
        "muted",
        13,
        "start",
    )
    return drawing


FIGURES = {
    "packages": packages,
    "batch": batch,
    "checkpoint": checkpoint,
    "token": token,
    "routed-block": routed_block,
    "patterns": patterns,
    "mesh": mesh,
    "data-order": order,
}
