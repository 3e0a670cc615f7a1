"""The picture of a comparison: the causal losses, the gap to top-k in a panel, the last values."""

import json

from modtrain.experiments.compare import comparison_report
from modtrain.training.config import TrainConfig
from modtrain.training.metric_names import CAUSAL_LOSS, TOP_K_LOSS

LAST = {"dense": (3.0, None), "[v1] $x_$": (2.75, 2.5)}


def test_the_gap_has_a_panel_and_the_legends_have_names_and_last_values(tmp_path, monkeypatch):
    arms = {}
    for number, (name, (causal, top_k)) in enumerate(LAST.items()):
        arms[name] = [TrainConfig(name=f"arm_{number}", runs_dir=str(tmp_path))]
        path = tmp_path / f"arm_{number}"
        path.mkdir()
        losses = {CAUSAL_LOSS: causal} | ({} if top_k is None else {TOP_K_LOSS: top_k})
        records = [{"step": step, "flops": 1e9 * step, **losses} for step in (1, 2)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    figures = []

    class Kept(comparison_report.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(comparison_report, "Figure", Kept)
    comparison_report.draw(arms, tmp_path / "picture.png")
    upper, lower = figures[0].axes
    texts = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (upper, lower)]
    assert texts == [["dense: 3.0000", r"[v1] \$x_\$: 2.7500"], [r"[v1] \$x_\$: +0.2500"]]
    (gap, _zero) = lower.lines
    assert list(gap.get_ydata()) == [0.25, 0.25]
    comparison_report.draw({"dense": arms["dense"]}, tmp_path / "dense.png")
    assert len(figures[1].axes) == 1
