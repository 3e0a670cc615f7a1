"""What a run would take, told before anything is built. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from modtrain.common.terminal import plain_console
from modtrain.data.mixture.usage import StageUsage, mixture_usage
from modtrain.data.remote.urls import is_url
from modtrain.data.stream.index_json import read_summary
from modtrain.data.stream.prepared import INDEX_NAME
from modtrain.models.depth.pattern import num_chosen
from modtrain.models.flops import (
    CONVENTIONS,
    TRAINING_OVER_FORWARD,
    dense_equivalent_flops,
    forward_flops,
    parameters,
)
from modtrain.optimizers.parameter_groups import num_trained
from modtrain.optimizers.registry import OPTIMIZERS
from modtrain.parallel.dims import ParallelDims
from modtrain.training.config import PlanConfig, TrainConfig
from modtrain.training.plan import TrainingPlan, data_mismatches, prepared_summary, resolve
from modtrain.training.schedules import lr_factor, num_warmup_steps

# In fp32, under bf16 mixed precision too.
_BYTES_PER_PARAMETER = 4


def show(asked: PlanConfig) -> None:
    """Print parameters, FLOPs, steps, schedule and memory of the run.

    Where it does not fit the prepared data that is there, it is planned as configured, with a
    warning on stderr.

    Raises:
        ConfigError: everything that is wrong with it, at once.
    """
    config, plan = resolve(asked, needs_data=False)
    console = plain_console()
    console.print(_parts(config, plan))
    console.print(_run(config, plan))
    if len(plan.stages) > 1:
        console.print(_stages(plan))
    if config.data.sources and not data_mismatches(config):
        console.print(_mixture(config, plan))
    console.print(_memory(config, plan.dims))
    if asked.conventions:
        console.print("FLOP conventions:")
        for line in CONVENTIONS:
            console.print(f"  - {line}")
    else:
        console.print("what counts as a FLOP: add --conventions", soft_wrap=True)
    _warn_of_mismatches(config)


def _warn_of_mismatches(config: TrainConfig) -> None:
    paths = config.data.paths.values()
    is_there = any(is_url(path) or (Path(path) / INDEX_NAME).exists() for path in paths)
    if is_there and (problems := data_mismatches(config)):
        where = f"the prepared data in {config.data.location}"
        head = f"warning: {where} does not fit this plan; train would refuse it"
        text = "\n".join([f"{head}:", *(f"  - {problem}" for problem in problems)])
        plain_console(stderr=True).print(text, markup=False, soft_wrap=True)


def _mixture(config: TrainConfig, plan: TrainingPlan) -> Table:
    usage = mixture_usage(config.data, plan.seq_len, plan.steps * plan.sequences_per_step)
    table = Table(title="data: tokens, share and epochs by source")
    for heading in ("from token", *usage.available):
        table.add_column(heading, justify="right")
    whole = StageUsage(0, plan.steps * plan.sequences_per_step, usage.total)
    for stage in (*usage.stages, whole):
        if stage is whole:
            table.add_section()
        cells = [
            f"{count * plan.seq_len:,} {count / sum(stage.samples.values()):.2%}"
            f" {count / max(1, usage.available[name]):.2f}x"
            for name, count in stage.samples.items()
        ]
        name = "all" if stage is whole else f"{stage.start * plan.seq_len:,}"
        table.add_row(name, *cells)
    return table


def _parts(config: TrainConfig, plan: TrainingPlan) -> Table:
    length = plan.seq_len
    at_end = ", at the last capacities" if len(plan.stages) > 1 else ""
    table = Table(title=f"model, at sequences of {length:,} tokens{at_end}")
    for heading in ("part", "parameters", "FLOPs a token, forward", "if dense"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    counts = parameters(config.model)
    executed = forward_flops(config.model, length)
    dense = dense_equivalent_flops(config.model, length)
    for name, count in counts.parts().items():
        flops = (executed.parts()[name] / length, dense.parts()[name] / length)
        if count or any(flops):
            table.add_row(name.replace("_", " "), f"{count:,}", *(f"{f:,.0f}" for f in flops))
    table.add_section()
    totals = (executed.total / length, dense.total / length)
    table.add_row("total", f"{counts.total:,}", *(f"{f:,.0f}" for f in totals))
    return table


def _run(config: TrainConfig, plan: TrainingPlan) -> Table:
    table = Table(title="run", show_header=False)
    dense = TRAINING_OVER_FORWARD * dense_equivalent_flops(config.model, plan.seq_len).total
    over_dense = plan.flops_per_token * plan.seq_len / dense
    mean, at_end = (", mean of the run", ", at the end") if len(plan.stages) > 1 else ("", "")
    routed = {i: c for i, c in enumerate(config.model.capacities) if c is not None}
    peak = config.optimizer.lr
    warmup = num_warmup_steps(config.schedule, plan.steps)
    last = peak * lr_factor(config.schedule, plan.steps - 1, plan.steps)
    ranks = plan.dims.data_parallel
    each = f" on each of {ranks} data-parallel ranks" if ranks > 1 else ""
    rows = {
        "routed layers": ", ".join(map(str, routed)) or "none",
        "executed over dense-equivalent FLOPs": f"{over_dense:.4f}",
        "training FLOPs a token": f"{plan.flops_per_token:,.0f}"
        f" ({TRAINING_OVER_FORWARD} x forward{mean})",
        "tokens a step": f"{plan.tokens_per_step:,} = {plan.sequences_per_step} sequences,"
        f" {plan.accumulate} micro-batches{each}",
        "steps": f"{plan.steps:,}",
        "tokens": f"{plan.tokens:,}{_epochs(config, plan)}",
        **_packing(config, plan),
        "training FLOPs": f"{plan.flops:.4e}",
        "schedule": f"{config.schedule.name}, {warmup:,} steps of warm-up to {peak:g},"
        f" {last:g} at the end",
        "optimizer": _optimizer(config, plan),
    }
    if trained := _trained(config):
        rows["trained"] = trained
    experts = config.model.experts
    if experts.count is not None:
        rows["experts"] = (
            f"{experts.count} of width {experts.width(config.model.ff_width)}, {experts.noop}"
            f" no-op, {experts.shared} shared; {experts.choice} choice, {experts.top_k} a token"
        )
    if routed:
        router = config.model.router
        rows["routers"] = (
            f"{router.target} by {router.score} score, gate {router.gate_formula}, {router.choice}"
            f" choice; causal: {', '.join(router.causal_routers) or 'as it is'}"
            f"{'; keys and values of all tokens' if router.keep_kv else ''}"
        )
        tokens = {num_chosen(capacity, plan.seq_len) for capacity in routed.values()}
        rows[f"tokens chosen in a routed layer{at_end}"] = ", ".join(map(str, sorted(tokens)))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _epochs(config: TrainConfig, plan: TrainingPlan) -> str:
    """Return how often the run reads the data, if there are prepared data that it can read."""
    summary = prepared_summary(config.data)
    # A mixture has a table of its own.
    if summary is None or config.data.sources or data_mismatches(config):
        return ""
    available = summary.num_samples(plan.seq_len) * plan.seq_len
    return f", {plan.tokens / max(1, available):.4g} epochs of {available:,}"


def _packing(config: TrainConfig, plan: TrainingPlan) -> dict[str, str]:
    """Return rows on the padding of prepared data whose documents are packed by best fit."""
    if data_mismatches(config):
        return {}
    summaries = {name: read_summary(path) for name, path in config.data.paths.items()}
    packed = {name: s.packing["train"] for name, s in summaries.items() if s.packing is not None}
    if not packed:
        return {}
    num_samples = plan.steps * plan.sequences_per_step
    read = {"": num_samples}
    if config.data.sources:
        read = mixture_usage(config.data, plan.seq_len, num_samples).total
    padding = sum(read[name] * summaries[name].padding_share("train") for name in packed)
    share = padding / max(1, num_samples)
    documents = sum(summaries[name].splits["train"].num_documents for name in packed)
    num_cut = sum(own.num_cut for own in packed.values())
    otherwise = sum(own.num_cut_if_concatenated for own in packed.values())
    return {
        "padding": f"{share:.2%} of these tokens: FLOPs are spent on it, and about"
        f" {plan.tokens * (1 - share):,.0f} tokens are predicted",
        "documents that are cut": f"{num_cut:,} of {documents:,}; laid end to end {otherwise:,}",
    }


def _optimizer(config: TrainConfig, plan: TrainingPlan) -> str:
    """Describe the optimizer: its rates where it has several, its state and its products."""
    spec, model = OPTIMIZERS[config.optimizer.name], config.model
    each = spec.state_bytes(model) / parameters(model).total
    parts = [spec.name, f"{each:.3g} bytes of state a parameter"]
    rates = spec.rates(config.optimizer)
    if len(rates) > 1:
        parts.append(", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    flops = spec.step_flops(model, config.optimizer)
    share = flops * plan.steps / plan.flops
    costs = f"products of {flops:.3e} FLOPs a step, {flops * plan.steps:.4e} in all"
    parts.append(f"{costs}: {share:.2%} on top of the training FLOPs" if flops else "no products")
    return "; ".join(parts)


def _trained(config: TrainConfig) -> str:
    """Describe which parameters are trained, and which at their own rates; empty: all alike."""
    parts = []
    if (count := num_trained(config.model, config.optimizer)) is not None:
        parts.append(
            f"{count:,} parameters, the others are frozen; FLOPs are counted as if all were trained"
        )
    for number, group in enumerate(config.optimizer.groups, 1):
        start = f" from step {group.start_step}" if group.start_step else ""
        names = ", ".join(group.parameters)
        parts.append(f"group {number}: {names} at {group.lr_scale:g} x the rate{start}")
    return "; ".join(parts)


def _stages(plan: TrainingPlan) -> Table:
    table = Table(title="schedule of capacities")
    for heading in ("steps", "capacity", "tokens chosen", "FLOPs a step", "share of FLOPs"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        capacities = [share for share in stage.capacities if share is not None]
        low, high = min(capacities), max(capacities)
        spent = plan.flops_until(stage.stop) - plan.flops_until(stage.first)
        table.add_row(
            f"{stage.first + 1:,} to {stage.stop:,}",
            _range(f"{low:.4g}", f"{high:.4g}"),
            _range(*(f"{num_chosen(share, plan.seq_len):,}" for share in (low, high))),
            f"{stage.flops_per_token * plan.tokens_per_step:.3e}",
            f"{spent / plan.flops:.1%}",
        )
    return table


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _memory(config: TrainConfig, dims: ParallelDims) -> Table:
    many = f" ({config.strategy.name}, {dims.world_size} processes)"
    where = many if dims.world_size > 1 else ""
    table = Table(title=f"memory of a device, without activations{where}", show_header=False)
    sizes = state_bytes(config, dims)
    for name, (size, pieces) in sizes.items():
        share = f" (1/{pieces})" if pieces > 1 else ""
        table.add_row(name + share, gibibytes(size))
    table.add_section()
    table.add_row("total", gibibytes(sum(size for size, _ in sizes.values())))
    return table


def state_bytes(config: TrainConfig, dims: ParallelDims) -> dict[str, tuple[int, int]]:
    """Return for each kind of state the bytes that a process holds, and in how many pieces it is.

    Activations are not in it. What ``strategy.offload`` moves lies in the host's memory.
    """
    optimizer, stage = OPTIMIZERS[config.optimizer.name], config.strategy.stage
    total = parameters(config.model).total
    each = _BYTES_PER_PARAMETER * total
    trained = num_trained(config.model, config.optimizer)
    share = 1.0 if trained is None else trained / total
    pieces = dims.world_size if stage else dims.copy
    # Of each: its size, and from which of ZeRO's stages on it is shared out.
    kinds = {
        "weights": (each, 3),
        "gradients": (round(each * share), 2),
        optimizer.state_label: (round(optimizer.state_bytes(config.model) * share), 1),
    }
    return {
        name: (size // pieces, pieces) if stage is None or stage >= least else (size, 1)
        for name, (size, least) in kinds.items()
    }


def device_bytes(config: TrainConfig, dims: ParallelDims) -> int:
    """Return the bytes of the state that a process keeps on its device, without activations."""
    sizes = state_bytes(config, dims)
    if config.strategy.offload:
        del sizes[OPTIMIZERS[config.optimizer.name].state_label]
        if config.strategy.stage == 3:
            del sizes["weights"]
    return sum(size for size, _ in sizes.values())


def gibibytes(size: int) -> str:
    """Return a number of bytes for people to read."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
