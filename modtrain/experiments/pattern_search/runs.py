"""The runs of a search: for each candidate and rung a trunk and a decay. Imports no torch.

Under ``schedule=wsd`` the learning rate is constant between warm-up and decay. A candidate's trunk
has the constant rate; at each rung it is extended to where the decay of that rung's budget begins,
by a run that branches off the one before, and the decay branches off its end. So the loss of a rung
is that of a run of its budget from the start, to the bit, and no step but those of the decays is
trained for one rung alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.experiments.pattern_search.candidates import Candidate
from modtrain.experiments.pattern_search.config import PatternSearchConfig
from modtrain.experiments.sweep.jobs import SweepJob, job_name, overrides_between
from modtrain.models.config import ModelConfig
from modtrain.models.depth.config import RouterConfig
from modtrain.training.config import BranchConfig, BudgetConfig, TrainConfig
from modtrain.training.plan import TrainingPlan, derive, resolve
from modtrain.training.schedules import decay_start


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run of the search. resolved: ``config`` with what follows from the data."""

    config: TrainConfig
    resolved: TrainConfig
    plan: TrainingPlan
    job: SweepJob

    @property
    def name(self) -> str:
        """The run's name, with that of the search."""
        return str(self.config.name)

    @property
    def own_flops(self) -> float:
        """Training FLOPs that are executed for this run alone."""
        return self.plan.flops - self.plan.flops_until(self.config.branch.step or 0)


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate at one rung: the piece of its trunk that the rung adds, and the decay."""

    candidate: Candidate
    rung: int
    trunk: PlannedRun
    decay: PlannedRun

    @property
    def own_flops(self) -> float:
        """Training FLOPs that are executed for this rung."""
        return self.trunk.own_flops + self.decay.own_flops


class RunPlanner:
    """Makes the runs of a search.

    config: its configuration. base: what the candidates share. defaults: the training configuration
    without overrides.

    Raises:
        ConfigError: everything wrong with what the candidates share.
    """

    def __init__(
        self, config: PatternSearchConfig, base: TrainConfig, defaults: TrainConfig
    ) -> None:
        self.config, self.base, self.defaults = config, base, defaults
        # Any budget: what depends on the data is the same for all.
        late = [group.start_step for group in base.optimizer.groups]
        any_budget = BudgetConfig(steps=1 + max(late, default=0))
        resolved, plan = resolve(replace(base, budget=any_budget), needs_data=False)
        self.model, self.seq_len, self.dims = resolved.model, plan.seq_len, plan.dims
        self.eos_id = resolved.data.eos_id

    def entries(self, candidate: Candidate) -> list[Entry]:
        """Return the candidate's entry of each rung, should it get there.

        Raises:
            ConfigError: a rung adds no step, or has none for its decay.
        """
        entries: list[Entry] = []
        problems: list[Problem] = []
        model, before = candidate.apply(self.base.model), BranchConfig()
        for rung, budget in enumerate(self.config.budgets):
            labels = {"candidate": candidate.name, "rung": str(rung)}
            decay = self._run(labels, model, BudgetConfig(flops=budget), before)
            start = decay_start(self.base.schedule, decay.plan.steps)
            problems += self._step_problems(rung, start, before.step or 0, decay.plan.steps)
            if problems:
                break
            trunk = self._trunk(candidate, model, rung, start, before)
            before = BranchConfig(trunk.name, start)
            decay = self._run(labels, model, BudgetConfig(flops=budget), before)
            entries.append(Entry(candidate, rung, trunk, decay))
        raise_if_any(problems)
        return entries

    def control(self, name: str, model: ModelConfig) -> PlannedRun:
        """Return a run of ``model``, which routes no layer, at the last rung's budget."""
        last = len(self.config.budgets) - 1
        labels = {"control": name, "rung": str(last)}
        # As the data says, unless it is configured.
        model = replace(model, vocab_size=self.base.model.vocab_size)
        budget = BudgetConfig(flops=self.config.budgets[last])
        return self._run(labels, model, budget, BranchConfig())

    def dense(self) -> PlannedRun:
        """Return the run of the dense model."""
        return self.control(
            "dense", replace(self.base.model, pattern="dense", router=RouterConfig())
        )

    def _step_problems(self, rung: int, start: int, before: int, steps: int) -> list[Problem]:
        budget = self.config.budgets[rung]
        if start >= steps:
            reason = (
                f"is {steps} steps of a candidate, and leaves none for the learning rate to decay"
            )
            remedy = (
                "give more, lower batch.tokens or schedule.warmup_steps, or raise schedule.decay"
            )
            return [Problem("budgets", f"{budget:g}", reason, remedy)]
        if start <= before:
            reason = f"adds no step before the decay, which begins after {start} steps"
            remedy = "give more, or lower batch.tokens or schedule.warmup_steps"
            return [Problem("budgets", f"{budget:g}", reason, remedy)]
        return []

    def _trunk(
        self, candidate: Candidate, model: ModelConfig, rung: int, stop: int, branch: BranchConfig
    ) -> PlannedRun:
        labels = {"candidate": candidate.name, "trunk": str(rung)}
        return self._run(labels, model, BudgetConfig(steps=stop), branch)

    def _run(
        self, labels: dict[str, str], model: ModelConfig, budget: BudgetConfig, branch: BranchConfig
    ) -> PlannedRun:
        base, name = self.base, job_name(labels)
        config = replace(
            base,
            name=f"{self.config.name}/{name}",
            model=model,
            budget=budget,
            branch=branch,
        )
        if budget.steps is not None:
            config = replace(
                config,
                schedule=replace(base.schedule, name="constant"),
                checkpoint=replace(base.checkpoint, keep_steps=[budget.steps]),
                # Its losses, without a decay, are of no use.
                eval=replace(base.eval, every=None, zero_routers="never"),
            )
        data = replace(config.data, seq_len=self.seq_len, eos_id=self.eos_id)
        with_vocabulary = replace(model, vocab_size=self.model.vocab_size)
        resolved = replace(config, model=with_vocabulary, data=data)
        swept = labels | {"model.pattern": str(model.pattern)}
        job = SweepJob(name, swept, overrides_between(self.defaults, config))
        return PlannedRun(config, resolved, derive(resolved, self.dims), job)


def plan_entries(planner: RunPlanner, candidates: list[Candidate]) -> dict[str, list[Entry]]:
    """Return each candidate's entries, by name.

    Raises:
        ConfigError: everything wrong with any of them, once for each value.
    """
    entries: dict[str, list[Entry]] = {}
    problems: dict[tuple[str, str], Problem] = {}
    for candidate in candidates:
        try:
            entries[candidate.name] = planner.entries(candidate)
        except ConfigError as error:
            # Candidates differ in their steps; one of them shows what is wrong.
            for problem in error.problems:
                problems.setdefault((problem.key, str(problem.value)), problem)
    raise_if_any(list(problems.values()))
    return entries
