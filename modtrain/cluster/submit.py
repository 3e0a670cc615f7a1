"""`modtrain submit`: checks a job, freezes its code, renders, validates and submits its script."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from modtrain.cluster import slurm
from modtrain.cluster.config import SubmitConfig, is_job_id
from modtrain.cluster.freeze import freeze
from modtrain.cluster.image import freeze_image
from modtrain.cluster.run_checks import awaits_data, run_problems
from modtrain.cluster.runs import CANCELLED, read_job_ids
from modtrain.cluster.script import SERIAL, JobScript, ScriptError, ScriptTask, check, render
from modtrain.cluster.site import SITE_OPTIONS
from modtrain.common.atomic_io import open_to_append, write_text
from modtrain.common.errors import ConfigError, Problem, raise_if_any
from modtrain.common.spelling import spelled
from modtrain.common.terminal import last_output, plain_console
from modtrain.training.run_directory import RunDirectory

# For which Slurm may look at a new job first.
_REASON_SECONDS = 2.0
# What it says before.
_NO_REASON = ("", "PartitionConfig")
# Messages of sbatch where it finds no controller.
_UNREACHABLE = ("Could not establish a configuration source", "Unable to contact slurm")


@dataclass(frozen=True)
class Submission:
    """A job, and what it or each task of its array is to do.

    directory: of the job as a whole. config_dir: of the user's own YAML, or None. runs_dir: where
    the run is looked for that ``after`` names.
    """

    config: SubmitConfig
    tasks: Sequence[ScriptTask]
    directory: Path
    config_dir: Path | None = None
    runs_dir: str = "runs"


def submit(submission: Submission) -> None:
    """Check a job, freeze its code, and submit it unless it is a dry run.

    Raises:
        ConfigError: everything wrong with the job or a run, before anything is written.
        ScriptError, SlurmError: Slurm would reject the script, or has rejected it.
    """
    console = plain_console(soft_wrap=True)
    submission = _with_awaited_job(submission, console)
    raise_if_any(_problems(submission))
    for task in submission.tasks:
        if task.config is not None and awaits_data(task.config, submission.config):
            console.print(
                f"{task.config.data.location} is not there yet: what depends on the data is checked"
                f" when the job starts, after job {submission.config.after}",
                highlight=False,
            )
    submission = _with_frozen_image(submission, console)
    job = _prepare(submission)
    text = render(job)
    check(text, job.script.name)
    write_text(job.script, text)
    console.print(f"wrote {job.script}", highlight=False)
    if slurm.has_slurm():
        console.print(_test_submission(job))
    elif not job.config.dry_run:
        raise ScriptError(
            f"sbatch is not available here: submit {job.script} on a login node of the cluster,"
            " or add --dry-run to only write it"
        )
    if job.config.dry_run:
        return
    ids = _submit_script(job)
    with last_output():
        for number in ids:
            console.print(f"submitted job {number}")
    _check_will_start(job, ids, console)
    with last_output():
        _print_next_commands(submission, ids, console)


def _with_awaited_job(submission: Submission, console: Console) -> Submission:
    """Return the submission with the job's id where ``after`` names a run or a preparation.

    Raises:
        ConfigError: there is none, or it has no job.
    """
    config, name = submission.config, submission.config.after
    if name is None or is_job_id(name):
        return submission
    for folder in (Path(submission.runs_dir) / name, Path("runs") / name, Path(name)):
        if RunDirectory(folder).is_complete:
            console.print(f"{folder} is complete: nothing to wait for", highlight=False)
            return replace(submission, config=replace(config, after=None))
        if folder.is_dir() and (ids := read_job_ids(folder)):
            console.print(f"waits for job {ids[-1]} of {folder}", highlight=False)
            return replace(submission, config=replace(config, after=ids[-1]))
    reason = "is no job's number, and no run or preparation that has a job"
    remedy = "give the number that sbatch printed, or submit that job first"
    raise ConfigError([Problem("after", name, reason, remedy)])


def _with_frozen_image(submission: Submission, console: Console) -> Submission:
    site = submission.config.cluster
    image, text = freeze_image(site)
    if text:
        console.print(text, highlight=False)
    return replace(
        submission, config=replace(submission.config, cluster=replace(site, image=image))
    )


def _test_submission(job: JobScript) -> str:
    """Validate the script with ``sbatch --test-only``; an objection of Slurm is an error."""
    try:
        _sbatch(job, "--test-only")
    except slurm.SlurmError as error:
        if job.config.dry_run and _is_unreachable(error):
            return "Slurm is not reachable from here: the script was not validated"
        raise
    return "Slurm accepts the script"


def _is_unreachable(error: slurm.SlurmError) -> bool:
    return any(message in str(error) for message in _UNREACHABLE)


def _sbatch(job: JobScript, *options: str) -> str:
    """Run sbatch without the user's SBATCH_ variables that the site's configuration overrides."""
    overridden = [name for name in SITE_OPTIONS if getattr(job.config.cluster, name) is not None]
    variables = [f"SBATCH_{name.upper()}" for name in overridden]
    return slurm.run(["sbatch", *options, str(job.script)], without_variables=variables)


def _prepare(submission: Submission) -> JobScript:
    """Make the directories, the copy of the code and the frozen configurations."""
    config, tasks, directory = submission.config, submission.tasks, submission.directory.resolve()
    for folder in {directory, *(task.directory.resolve() for task in tasks)}:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    code = freeze(directory, submission.config_dir)
    for task in tasks:
        if task.config is not None:
            plain = OmegaConf.to_yaml(OmegaConf.structured(task.config))
            write_text(task.directory / "submitted.yaml", plain)
    # Slurm's patterns begin with a percent sign, which is escaped in the folder's name.
    logs = Path(str(directory / "logs").replace("%", "%%"))
    python = sys.executable if config.cluster.container == "none" else "python3"
    return JobScript(
        name=job_name(directory, tasks[0].verb),
        script=directory / _script_name(tasks, config),
        output=logs / ("slurm-%A_%a.out" if config.array or config.workers else "slurm-%j.out"),
        directory=Path.cwd(),
        code=code,
        python=python if config.cluster.python is None else config.cluster.python,
        config=config,
        tasks=[replace(task, directory=task.directory.resolve()) for task in tasks],
        config_dir=None if submission.config_dir is None else code / "own_conf",
    )


def _script_name(tasks: Sequence[ScriptTask], config: SubmitConfig) -> str:
    """Return the script's name; an array's contains a digest of its tasks.

    A task that resubmits itself is identified by its index, which must stay that of its run.
    """
    if config.array:
        directories = "\0".join(str(task.directory) for task in tasks)
        return f"submit-{hashlib.sha256(directories.encode()).hexdigest()[:8]}.sbatch"
    return "submit.sbatch" if tasks[0].verb == "train" else f"{tasks[0].verb}.sbatch"


def job_name(directory: Path, verb: str = "train") -> str:
    """Return a plain name for ``squeue``: the run's last two parts, and ``-eval`` for that."""
    parts = [part for part in directory.parts[-2:] if part != "runs"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))[:60].strip("-") or "modtrain"
    return f"{name}-eval" if verb == "eval" else name


def _submit_script(job: JobScript) -> list[str]:
    """Submit the script; a chain's jobs depend on one another, and are submitted all or none."""
    ids: list[str] = []
    for _ in range(job.config.num_chained):
        dependency = _chained_dependency(job.config, ids[-1]) if ids else []
        try:
            output = _sbatch(job, "--parsable", *dependency)
        except slurm.SlurmError as error:
            if not ids:
                raise
            withdrawn = _withdraw(job, ids)
            raise slurm.SlurmError(
                f"{error}\nthat was job {len(ids) + 1} of chain={job.config.chain}; {withdrawn}"
            ) from None
        number = output.strip().splitlines()[-1].split(";")[0]
        _record_job(job, number, ids[-1] if ids else None)
        ids.append(number)
    return ids


def _chained_dependency(config: SubmitConfig, previous: str) -> list[str]:
    """Return sbatch's option for a job after ``previous``; it overrides the script's directive."""
    # The end of the previous job would satisfy its dependency even if it never began.
    awaited = f"afterok:{config.after}," if config.after else ""
    return [f"--dependency={awaited}afterany:{previous}"]


def _withdraw(job: JobScript, ids: Sequence[str]) -> str:
    """Cancel jobs that were submitted just now; return a sentence on them."""
    shown = ", ".join(ids)
    # One that has started must not come back.
    for folder in {job.script.parent, *(task.directory for task in job.tasks)}:
        with open_to_append(folder / CANCELLED) as file:
            file.write("".join(f"{number}\n" for number in ids).encode())
    try:
        slurm.cancel(ids)
    except slurm.SlurmError as error:
        return f"{shown} could not be withdrawn, and may run: {error}"
    return f"{shown}: withdrawn"


def _check_will_start(job: JobScript, ids: Sequence[str], console: Console) -> None:
    """Withdraw jobs that wait for what cannot come; a warning where Slurm does not say.

    Raises:
        SlurmError: the reason, with the remedy.
    """
    until = time.monotonic() + _REASON_SECONDS
    while True:
        try:
            jobs = slurm.jobs(ids)
        except slurm.SlurmError as error:
            # They are in the queue already.
            console.print(f"warning: whether they can start is not known: {error}", highlight=False)
            return
        for number, known in jobs.items():
            remedy = slurm.never_starts(known)
            if remedy is not None:
                raise slurm.SlurmError(
                    f"job {number} would never start: {known.reason}; {_withdraw(job, ids)}\n"
                    f"remedy: {remedy}"
                )
        # Slurm gives its reason when it first looks at the job.
        is_known = all(k.reason not in _NO_REASON or not k.is_pending for k in jobs.values())
        if is_known or time.monotonic() > until:
            return
        time.sleep(0.2)


def _record_job(job: JobScript, number: str, before: str | None) -> None:
    """Record which job works on which run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    verb = job.tasks[0].verb
    entry = {"time": now, "script": str(job.script), "chained_after": before, "verb": verb}
    numbers = {job.script.parent: number}
    if job.config.array:
        numbers |= {task.directory: f"{number}_{index}" for index, task in enumerate(job.tasks)}
    for folder, job_id in numbers.items():
        # A job that has started was recorded by its script.
        if verb == "eval" or job_id not in read_job_ids(folder):
            with open_to_append(folder / "jobs.jsonl") as file:
                file.write(json.dumps({"job": job_id, **entry}).encode() + b"\n")


def _print_next_commands(submission: Submission, ids: Sequence[str], console: Console) -> None:
    tasks = submission.tasks
    if tasks[0].config is None:
        console.print(f"follow: tail -F {submission.directory}/logs/slurm-*.out")
        console.print(f"cancel: scancel {' '.join(ids)}")
        return
    runs, name = tasks[0].config.runs_dir, tasks[0].config.name
    if len(tasks) > 1:
        name = str(Path(str(name)).parent)
    runs_dir = "" if runs == "runs" else f" {spelled('runs_dir', runs)}"
    for purpose, verb in (("state", "status"), ("follow", "logs"), ("cancel", "cancel")):
        option = " follow=true" if verb == "logs" else ""
        console.print(f"{purpose}: modtrain {verb} {spelled('run', str(name))}{runs_dir}{option}")
    if submission.config.is_resubmitted:
        console.print(
            "a job with another id resumes the run when this one stops: submit dependent jobs once"
            f" the run is complete, since after={ids[-1]} might wait for ever"
        )


def _problems(submission: Submission) -> list[Problem]:
    config, tasks, directory = submission.config, submission.tasks, submission.directory
    problems = config.problems()
    if re.search(r"[\x00-\x1f\x7f\\]", str(directory.resolve())):
        # In a log's name Slurm interprets a backslash, which cannot be escaped.
        reason, remedy = "has a control character or a backslash in it", "give another name"
        problems.append(Problem("name", repr(str(directory)), reason, remedy))
    verb = tasks[0].verb
    if verb == "eval" and config.after is None and not (directory / "config.yaml").is_file():
        remedy = "list runs with modtrain status; after=JOB waits for one that is not trained yet"
        problems.append(Problem("run", str(directory), "has no run", remedy))
    if verb in SERIAL and config.nodes > 1:
        remedy = "leave it out: only train and debug use several nodes"
        problems.append(Problem("nodes", config.nodes, f"and {verb} is one process", remedy))
    if not problems:
        runs = [task.config for task in tasks if task.config is not None]
        raise_if_any([problem for run in runs for problem in run_problems(run, config)])
        if runs and not config.dry_run and all(RunDirectory.of(run).is_complete for run in runs):
            remedy = "give another name= for a new run; modtrain status shows this one"
            problems.append(Problem("name", runs[0].name, "is complete already", remedy))
        problems += _queue_problems(tasks, config) + _after_problems(config)
    return problems


def _after_problems(config: SubmitConfig) -> list[Problem]:
    """Find that the awaited job is unknown, or has ended otherwise than well."""
    if config.after is None or not slurm.has_slurm():
        return []
    try:
        job = slurm.jobs([config.after]).get(config.after)
    except slurm.SlurmError as error:
        if config.dry_run and _is_unreachable(error):
            return []
        raise
    if job is None:
        # With it sbatch would start the job at once, whatever has become of the other one.
        reason = "is no job that Slurm knows: it ended some minutes ago, or there was none"
        remedy = "leave it out once modtrain status shows the run as complete"
    elif job.is_finished and job.state != "COMPLETED":
        reason = f"has not ended well: {job.state}"
        remedy = "submit the awaited job again, and wait for its new number"
    else:
        return []
    return [Problem("after", config.after, reason, remedy)]


def _queue_problems(tasks: Sequence[ScriptTask], config: SubmitConfig) -> list[Problem]:
    """Find jobs that are in the queue for a run already: two would conflict."""
    if not slurm.has_slurm():
        return []
    folders = [task.directory for task in tasks if task.config is not None]
    ids = [job_id for folder in folders for job_id in read_job_ids(folder)]
    try:
        jobs_by_id = slurm.jobs(ids)
    except slurm.SlurmError as error:
        if config.dry_run and _is_unreachable(error):
            return []
        raise
    active = [i for i in ids if i in jobs_by_id and not jobs_by_id[i].is_finished]
    if not active:
        return []
    remedy = "let it continue, or use modtrain cancel; chain=N submits N jobs in sequence"
    return [Problem("job", ", ".join(active), "is in the queue for this run already", remedy)]
