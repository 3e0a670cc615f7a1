"""The model card of an exported run: ``README.md`` of its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import modtrain
from modtrain.common.reading import read_json, read_or_set_aside
from modtrain.data.stream.prepared import IndexSummary
from modtrain.interop.architectures import OWN, architecture
from modtrain.interop.prompt_format import PromptFormat
from modtrain.models.config import ModelConfig
from modtrain.models.flops import dense_equivalent_flops, forward_flops, parameters
from modtrain.training.config import MUTABLE_KEYS, TrainConfig
from modtrain.training.metrics_log import read_metrics
from modtrain.training.plan import derive
from modtrain.training.run_directory import RunDirectory

_LOSS, _FLOPS = "held_out/causal_loss_", "held_out/causal_flops_per_token_"
_METHOD = "[Mixture-of-Depths](https://arxiv.org/abs/2404.02258)"


@dataclass(frozen=True)
class Loss:
    """A held-out loss in nats a token, and the forward FLOPs a token that it took."""

    loss: float
    flops: float


def model_card(run: RunDirectory, trained: TrainConfig, step: int, data: IndexSummary) -> str:
    """Return the text of the card.

    step: of the checkpoint. data: what the run was trained on.
    """
    prompt_format = PromptFormat.read(run.path).of_tokenizer(data.tokenizer_sha256)
    # Runs of earlier versions have it in their manifest alone.
    imported = run.read_manifest().get("imported")
    origin = prompt_format.origin or imported or {}
    sections = [
        _front_matter(trained.model),
        f"# {trained.name}\n\n{_introduction(trained.model, origin, imported is not None)}",
        f"## Use\n\n{_usage(trained.model, prompt_format)}",
        f"## Shape\n\n{_shape(trained.model)}",
        f"## Compute\n\n{_compute(run, trained, step, data)}",
    ]
    if origin:
        sections.append(f"## Origin\n\n{_origin(origin)}")
    if imported is None:
        sections += [
            f"## Training\n\n{_training(trained, step, data)}",
            f"## Repeat it\n\n{_repetition(run, trained)}",
        ]
    return "\n\n".join(sections) + "\n"


def held_out_losses(run: RunDirectory, step: int) -> dict[str, Loss]:
    """Return the losses of the checkpoint of ``step`` by causal decision; empty if not evaluated.

    Those of `modtrain eval`, of the whole held-out text, are preferred to those of training.
    """
    evaluated = read_or_set_aside(run.path / f"eval-{step:09d}.json", read_json) or {}
    decisions = evaluated.get("decisions")
    if isinstance(decisions, dict) and decisions:
        return {
            name: Loss(_finite_or_nan(entry["loss"]), entry["flops"])
            for name, entry in decisions.items()
        }
    losses: dict[str, Loss] = {}
    for record in read_metrics(run.metrics):
        for key in record if record["step"] == step else ():
            name = key.removeprefix(_LOSS)
            if key.startswith(_LOSS) and _FLOPS + name in record:
                losses[name] = Loss(record[key], record[_FLOPS + name])
    return losses


def _front_matter(model: ModelConfig) -> str:
    tags = ["modtrain"]
    tags += ["mixture-of-depths"] if model.is_routed else []
    tags += ["mixture-of-experts"] if model.expert_labels else []
    content = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _introduction(model: ModelConfig, origin: Mapping[str, Any], is_imported: bool) -> str:
    kind = "A dense language model"
    if model.is_routed:
        kind = f"A {_METHOD} language model: a token that a router does not choose passes by"
    elif model.expert_labels:
        kind = "A language model with mixtures of experts"
    if not origin:
        return f"{kind}, trained by modtrain {modtrain.__version__}."
    source = Path(origin["source"]).name
    how = "its weights unchanged" if is_imported else "trained on"
    return f"{kind}, made of `{source}` by modtrain {modtrain.__version__}, {how}."


def _origin(origin: Mapping[str, Any]) -> str:
    """Describe what was imported; its path on the machine is nobody else's business."""
    rows = {"model": f"`{Path(origin['source']).name}`", "family": origin["model_type"]}
    files = _table(("file", "SHA-256"), ((f"`{n}`", f"`{d}`") for n, d in origin["files"].items()))
    return "\n\n".join(
        [
            "The weights that it started with were imported. The licence of the original holds for"
            " them.",
            _table(("", ""), rows.items()),
            files,
        ]
    )


def _usage(model: ModelConfig, prompt_format: PromptFormat) -> str:
    is_own = architecture(model) == OWN
    trust = ", trust_remote_code=True" if is_own else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/of/this/folder"',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        'inputs = tokenizer("Once", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
    ]
    if prompt_format == PromptFormat(origin=prompt_format.origin):
        lines.append(
            "The end-of-text token also begins a text, for a prompt that is empty, and pads it."
        )
    else:
        lines.append("Tokenizer and special tokens are those of the original.")
    if prompt_format.chat_template is not None:
        lines.append("Its chat template, too: `tokenizer.apply_chat_template(messages)`.")
    if is_own:
        lines.append(
            "The code beside the weights needs transformers 5 and torch alone. It decides token by"
            " token, as sampling has to; training with top-k, as the model was made, is not in it."
        )
    if len(model.causal_selections) > 1:
        lines.append(
            f"Causal decisions: {', '.join(model.causal_selections)};"
            f' `decision="{model.causal_selections[1]}"` as an argument of `from_pretrained`'
            " uses another one than the first."
        )
    return "\n".join(lines)


def _shape(model: ModelConfig) -> str:
    rows: dict[str, object] = {
        "architecture": architecture(model),
        "parameters": f"{parameters(model).total:,}",
        "vocabulary": f"{model.vocabulary:,}",
        "layers": model.num_layers,
        "width": model.d_model,
        "mixers": ", ".join(dict.fromkeys(model.mixers)),
        "heads": f"{model.num_heads} of {model.head_width}, {model.kv_heads} of keys and values",
        "MLP": f"{model.activation}, {model.ff_width}",
    }
    if model.sliding_window is not None:
        rows["sliding window"] = f"{model.sliding_window} tokens"
    if model.is_routed:
        rows |= _routing_rows(model)
    if model.expert_labels:
        experts = model.experts
        rows["experts"] = (
            f"{experts.count} of width {experts.width(model.ff_width)}, {experts.noop} no-op,"
            f" {experts.shared} shared; {experts.choice} choice, {experts.top_k} a token"
        )
        rows["layers with experts"] = ", ".join(
            str(layer) for layer in range(model.num_layers) if model.has_experts(layer)
        )
    return _table(("", ""), rows.items())


def _routing_rows(model: ModelConfig) -> dict[str, object]:
    router = model.router
    capacities = {i: c for i, c in enumerate(model.capacities) if c is not None}
    return {
        "routed layers": ", ".join(f"{layer} at {share:g}" for layer, share in capacities.items()),
        "routed part": router.target + ("; all tokens' keys and values" if router.keep_kv else ""),
        "router's score": router.score,
        "gate": router.gate_formula,
        "choice in training": f"{router.choice} choice",
        "causal decisions": ", ".join(model.causal_selections),
    }


def _finite_or_nan(loss: float | None) -> float:
    """Return a loss as it was: JSON has null for one that is no number."""
    return math.nan if loss is None else loss


def _compute(run: RunDirectory, trained: TrainConfig, step: int, data: IndexSummary) -> str:
    length = trained.data.seq_len or data.seq_len
    dense = dense_equivalent_flops(trained.model, length).total / length
    executed = forward_flops(trained.model, length).total / length
    rows = [("as trained", "-", f"{executed:,.0f}", f"{executed / dense:.3f}")]
    losses = held_out_losses(run, step)
    rows += [
        (name, f"{at.loss:.4f}", f"{at.flops:,.0f}", f"{at.flops / dense:.3f}")
        for name, at in losses.items()
    ]
    if executed != dense:
        rows.append(("if every token entered every layer", "-", f"{dense:,.0f}", "1.000"))
    heads = ("decision", "held-out loss (nats a token)", "forward FLOPs a token", "of dense")
    parts = [_table(heads, rows)]
    if not losses:
        parts.append(f"Step {step} has not been evaluated: `modtrain eval run={trained.name}`.")
    if points := _sweep(run, step):
        parts.append("At other capacities, to which the routers' thresholds were calibrated:")
        parts.append(_table(("capacity", *heads[1:3]), points))
    return "\n\n".join(parts)


def _sweep(run: RunDirectory, step: int) -> list[tuple[str, str, str]]:
    """Return the points of `modtrain eval sweep=[…]`, if the checkpoint has been swept."""
    swept = read_or_set_aside(run.path / f"sweep-{step:09d}.json", read_json) or {}
    return [
        (f"{point['capacity']:g}", f"{_finite_or_nan(point['loss']):.4f}", f"{point['flops']:,.0f}")
        for point in swept.get("points", [])
    ]


def _training(trained: TrainConfig, step: int, data: IndexSummary) -> str:
    plan = derive(trained)
    rows = {
        "steps": f"{step:,} of {plan.steps:,}",
        "tokens": f"{step * plan.tokens_per_step:,}",
        "training FLOPs, executed": f"{plan.flops_until(step):.4g}",
        "tokens a sequence": f"{plan.seq_len:,}",
        "tokens a step": f"{plan.tokens_per_step:,}",
        "optimizer": f"{trained.optimizer.name}, peak learning rate {trained.optimizer.lr:g}",
        "schedule": trained.schedule.name,
        "seed": trained.seed,
        "data fingerprint": f"`{data.fingerprint}`",
    }
    text = _table(("", ""), rows.items())
    if trained.data.eos_id is not None:
        text += (
            "\n\nIn training no token looked beyond its own document: attention and routing were"
            " masked between the documents of a sequence. This folder has no such mask. For one"
            " document in a text it computes what training did. Of several documents in one text,"
            " a later one attends to those before it, which training never did: give each document"
            " alone, padded to a batch."
        )
    return text


def _repetition(run: RunDirectory, trained: TrainConfig) -> str:
    starts = run.read_manifest()["starts"]
    first: Mapping[str, Any] = starts[0] if starts else {}
    code = first.get("code") or {}
    changed = ", with uncommitted changes" if code.get("diff") else ""
    packages = ", ".join(f"{name} {version}" for name, version in first.get("packages", {}).items())
    versions = {
        "modtrain": f"{first.get('modtrain', modtrain.__version__)}, commit"
        f" {code.get('commit', 'unknown')}{changed}",
        "packages": packages or "unknown",
        "device": first.get("device", "unknown"),
    }
    name = Path(str(trained.name)).name
    return "\n\n".join(
        [
            "Prepare the data of the fingerprint above, save this as"
            f" `mine/experiment/{name}.yaml`, and train:",
            f"```bash\nmodtrain train --config-dir mine experiment={name} name={name}"
            f"{_data_paths(trained)}\n```",
            f"```yaml\n# @package _global_\n{_configuration(trained)}```",
            _table(("", ""), versions.items()),
        ]
    )


def _data_paths(trained: TrainConfig) -> str:
    """Return the overrides that name where the prepared data are."""
    if not trained.data.sources:
        return " data.path=PREPARED"
    paths = [f" data.sources.{name}.path=PREPARED" for name in sorted(trained.data.sources)]
    return "".join([" data=mixture", *paths])


def _configuration(trained: TrainConfig) -> str:
    """Return as YAML what decides the weights."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(trained)))
    for source in content["data"]["sources"].values():
        source["path"] = "PREPARED"
    for key in MUTABLE_KEYS:
        if "*" in key:
            continue
        *sections, last = key.split(".")
        node = content
        for section in sections:
            node = node[section]
        if key != "batch.micro_batch_size":
            node.pop(last)
    text: str = yaml.safe_dump(content, sort_keys=False, width=96, default_flow_style=None)
    return text


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
