"""Jobs as they are rendered: every value is data, and invalid jobs are refused before the queue."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from modtrain.cli.compose import compose, conf_dir
from modtrain.cli.compose_verbs import compose_submission
from modtrain.cli.schemas import SUBMITTED
from modtrain.cluster.config import ClusterConfig, SubmitConfig, seconds_of
from modtrain.cluster.freeze import freeze
from modtrain.cluster.script import JobScript, ScriptError, ScriptTask, check, render, slurm_dir
from modtrain.cluster.slurm import SlurmError
from modtrain.cluster.submit import job_name, submit
from modtrain.common.errors import OtherRunError
from modtrain.common.spelling import quoted
from modtrain.training.run import train
from tests.cluster.fake_runs import line, play
from tests.conftest import run_modtrain
from tests.helpers.problems import problems_of

TEMPLATES = sorted(slurm_dir().glob("*.sbatch"))
SITES = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))
NASTY = st.text(
    st.sampled_from("ab '\"\\$`(){}[];&|<>*?!#%~=\n\t-,é")
    | st.characters(codec="utf-8", exclude_characters="\0"),
    max_size=30,
)


def a_job(task=None, config=None, directory=Path("/work dir")):
    return JobScript(
        name="job",
        script=directory / "submit.sbatch",
        output=directory / "slurm-%j.out",
        directory=directory,
        code=directory / "code",
        python="/usr/bin/python3",
        config=config or SubmitConfig(),
        tasks=[task or ScriptTask("train", ["name=x"], directory)],
    )


def settings(text, *names):
    """What bash makes of the settings of a script: their values, as bytes between zeros."""
    block = text.split("# --- settings ---")[1].split("# --- end of settings")[0]
    shown = " ".join(f'"${{{name}[@]}}"' for name in names)
    done = subprocess.run(
        ["bash", "-uc", f"{block}\nprintf '%s\\0' {shown}"], capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def submitted(words):
    submission = compose_submission(words)
    submit(submission)


@settings_of(max_examples=30, deadline=None)
@given(st.lists(NASTY, max_size=4), NASTY.filter(len), NASTY)
def test_whatever_is_in_an_override_reaches_modtrain_as_it_is(overrides, module, value):
    site = ClusterConfig(modules=[module], environment={"A": value})
    job = a_job(ScriptTask("train", overrides, Path("run")), SubmitConfig(cluster=site))
    text = render(job)
    check(text, "it")
    assert settings(text, "overrides") == ["--", *overrides]
    assert settings(text, "modules", "variables") == [module, f"A={value}"]


@pytest.mark.parametrize("name", ["a b", 'say "it"', "back\\slash", "$(touch pwned)", "`x`", "a#b"])
def test_a_path_in_a_directive_is_one_word(name):
    text = render(a_job(directory=Path("/somewhere") / name))
    (line,) = re.findall(r"^#SBATCH --chdir=(.*)$", text, re.MULTILINE)
    # sbatch reads a directive as a shell reads what is in double quotes, but expands nothing.
    assert shlex.split(line, comments=True) == [f"/somewhere/{name}"]


def test_a_line_break_in_a_directive_is_refused():
    with pytest.raises(ScriptError, match="control character"):
        render(a_job(directory=Path("/somewhere\n#SBATCH --uid=0")))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_a_script(template):
    text = template.read_text()
    check(text, template.name)
    assert "#SBATCH --job-name" in text
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("site", SITES)
def test_a_shipped_site_is_sound(site):
    submission = compose_submission(["debug", f"cluster={site}"])
    text = render(a_job(ScriptTask("debug", [], Path("run")), submission.config))
    check(text, site)


@pytest.mark.slow
def test_shell_scripts_are_linted():
    # It sources the others.
    files = [slurm_dir() / "job.sh", *TEMPLATES]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    command = [shellcheck, "-xa", "-P", slurm_dir(), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [("if true; then\n", "not a valid shell script"), ("true\n#SBATCH --nodes=2\n", "line 2")],
)
def test_what_sbatch_would_not_see_is_reported(text, message):
    with pytest.raises(ScriptError, match=message):
        check(text, "it")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:0:1", 86401)],
)
def test_times_are_slurms(time, seconds):
    assert seconds_of(time) == seconds
    assert not [p for p in SubmitConfig(time=time).problems() if "not a time limit" in p.reason]


@pytest.mark.parametrize(
    ("written", "read", "meant"),
    [
        ("4:00:00", "would be read as 14400", '"4:00:00"'),
        ("1:00:00", "would be read as 3600", '"1:00:00"'),
        ("10080", "7 days", '"2:48:00" in quotes, or 7-00:00:00'),
    ],
)
def test_a_time_that_yaml_reads_as_a_number_is_reported(written, read, meant, tmp_path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/mine.yaml").write_text(f"time: {written}\n")
    problems = problems_of(compose_submission, ["debug", "cluster=mine"], str(tmp_path))
    (problem,) = problems.values()
    assert problem.key == "cluster.time"
    assert read in problem.reason
    assert meant in problem.remedy
    (tmp_path / "cluster/mine.yaml").write_text("time: '4:00:00'\n")
    assert compose_submission(["debug", "cluster=mine"], str(tmp_path)).config.cluster.time


@pytest.mark.parametrize("option", ["--clusters=b", "--clusters b", "--cluster=b", "-M b", "-Mb"])
def test_a_job_goes_to_the_cluster_that_is_asked_for_its_state(option):
    (problem,) = ClusterConfig(options=[option]).problems("cluster")
    assert problem.key == "cluster.options"
    assert "SLURM_CLUSTERS" in problem.remedy
    assert not ClusterConfig(options=["--cluster-constraint=a", "--mem=1G"]).problems("cluster")


@pytest.mark.parametrize(
    ("words", "key", "message"),
    [
        (["train", "node=2"], "node", "did you mean nodes?"),
        (["prepare", "partition=x"], "partition", "did you mean cluster.partition?"),
        (["debug", "node=2"], "node", "did you mean nodes?"),
        (["debug", "cluster.environment.A=1"], "cluster.environment.A", "+cluster.environment.A=1"),
        (["debug", "+cluster.environment.FOO=[1]"], "cluster.environment.FOO", "of that type"),
        (["train", "array.low=['seed=1']"], "array.low", shlex.quote("+array.low=['seed=1']")),
        (["train", "+array={1e-3: ['seed=1']}"], "array", "begin the name with a letter"),
        (["train", "+array={true: ['seed=1']}"], "array", "begin the name with a letter"),
    ],
)
def test_a_mistake_in_the_jobs_keys_has_a_remedy(words, key, message):
    assert message in problems_of(compose_submission, words)[key].remedy


def test_a_wrong_directory_of_configurations_is_reported_once(tmp_path):
    problems = problems_of(compose_submission, ["train", "name=x"], str(tmp_path / "nowhere"))
    assert list(problems) == ["--config-dir"]


@given(NASTY.filter(lambda text: "\n" not in text))
def test_hydra_reads_a_quoted_text_as_it_was(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"name={quoted(text)}")
    assert parsed.value() == text


def test_the_jobs_own_keys_are_no_verbs():
    from dataclasses import fields

    from modtrain.cli.compose import SCHEMAS

    own = {field.name for field in fields(SubmitConfig)}
    for verb in set(SUBMITTED) - {"debug"}:
        assert own & {field.name for field in fields(SCHEMAS[verb])} == set(), verb


def test_a_task_of_an_array_can_be_waited_for():
    submission = compose_submission(["debug", "after=123_4", "time=30"])
    assert submission.config.after == "123_4"
    assert "#SBATCH --dependency=afterok:123_4" in render(
        a_job(ScriptTask("debug", [], Path("run")), submission.config)
    )


@pytest.mark.parametrize(
    ("verb", "words", "script"),
    [
        ("search", ["study=s", "space.model.capacity=interval(0.1,0.5)"], "sweep_worker"),
        ("compare", ["name=s", "+arms={a: ['seed=0'], b: ['seed=1']}"], "sweep_worker"),
        ("eval", ["run=s"], "eval"),
    ],
)
def test_other_verbs_are_jobs_of_one_process(verb, words, script, tiny):
    if verb != "eval":
        words = [*words, *tiny]
    submission = compose_submission([verb, *words, "nodes=1"])
    assert submission.directory == Path("runs/s")
    job = a_job(ScriptTask(verb, submission.tasks[0].overrides, Path("run")), submission.config)
    text = render(job)
    assert f"slurm/{script}.sbatch" in text
    assert settings(text, "verb", "overrides") == [verb, "--", *words]


@pytest.mark.parametrize(
    ("verb", "asked", "options"),
    [
        ("train", {}, "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --mem=0 --requeue"),
        (
            "debug",
            {"nodes": 2},
            "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --mem=0 --no-requeue",
        ),
        ("eval", {}, "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --requeue"),
        ("eval", {"gpus_per_node": 8}, "--ntasks-per-node=1 --gpus-per-node=8 --mem=0"),
        ("prepare", {}, "--nodes=1 --ntasks-per-node=1 --requeue"),
        ("isoflop", {}, "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --requeue"),
        ("search-patterns", {}, "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1 --requeue"),
        ("train", {"gpus_per_node": 1}, "--ntasks-per-node=1 --gpus-per-node=1 --requeue"),
    ],
)
def test_a_verb_has_the_nodes_and_gpus_that_it_can_use(verb, asked, options):
    config = SubmitConfig(cluster=ClusterConfig(memory_per_node="0"), **asked)
    lines = render(a_job(ScriptTask(verb, [], Path("run")), config)).splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert set(options.split()) <= directives
    # What is not asked for is not there: memory of a node that others share, and no GPU at all.
    for option in ("--gpus-per-node", "--mem"):
        assert any(o.startswith(option) for o in directives) == (option in options), option


@pytest.mark.slow
def test_a_run_of_another_configuration_is_refused_before_the_queue(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(compose("train", ["name=x", *tiny]))
    words = ["train", "name=x", *tiny, "cluster=cpu", "dry_run=true"]
    submitted(words)
    with pytest.raises(OtherRunError, match=r"optimizer\.lr") as error:
        submitted([*words, "optimizer.lr=0.5"])
    # A job that ends with it is not started again.
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["prepared"], "submit"),
        (["train", "nodes=0"], "nodes"),
        (["train", "gpus_per_node=9"], "gpus_per_node"),
        (["train", "processes_per_node=2"], "processes_per_node"),
        (["train", "time=soon"], "time"),
        (["train", "time=4"], "time"),
        (["train", "chain=0"], "chain"),
        (["train", "after=first"], "after"),
        (["train", "cluster=nowhere"], "cluster"),
        (["train", "cluster.container=apptainer"], "cluster.image"),
        (["train", "cluster.options=[partition=x]"], "cluster.options"),
        (["train", "+cluster.environment={a-b: 1}"], "cluster.environment"),
        (["train", "+array={.up: ['seed=1']}"], "array"),
        (["prepare", '+array={a: ["seed=1"]}'], "array"),
        (["train", "model.capacity=2"], "model.capacity"),
        (["eval", "run=nowhere"], "run"),
        (["eval", "run=nowhere", "after=3", "nodes=2"], "nodes"),
        (["train", "at_once=2"], "at_once"),
        (["train", "after=3", "cluster.restart=resubmit"], "after"),
        (["eval", "run=nowhere", "after=3_1", "cluster.restart=resubmit"], "after"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_written(words, key, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["name=x", *tiny] if words[0] == "train" else []
    assert key in problems_of(submitted, [words[0], *more, *words[1:]])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def played(tmp_path, monkeypatch):
    """An sbatch that gives the number 4711, and an squeue in whose answer that job waits."""
    folder = play(monkeypatch, tmp_path, line("4711", "PENDING", "Priority", command=""))
    (folder / "sbatch").write_text("#!/bin/sh\necho 4711\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("more", "is_warned"),
    [
        (["chain=complete"], True),
        (["cluster.restart=resubmit"], True),
        ([], False),
        (["chain=2", "cluster.restart=resubmit"], False),
    ],
)
def test_waiting_for_a_number_warns_where_no_job_can(more, is_warned, tiny, played, capsys):
    submitted(["train", "name=x", *tiny, "cluster=cpu", *more])
    output = " ".join(capsys.readouterr().out.split())
    assert "submitted job 4711" in output
    assert ("after=4711 might wait for ever" in output) == is_warned


@pytest.mark.parametrize("more", [[], ["after=4711"]])
def test_a_job_of_the_same_run_is_not_to_be_waited_for(more, tiny, played):
    """It ends well once there is nothing left to do."""
    words = ["train", "name=x", *tiny, "cluster=cpu"]
    submitted(words)
    (problem,) = problems_of(submitted, [*words, *more]).values()
    assert (problem.key, problem.value) == ("job", "4711")
    assert "modtrain cancel" in problem.remedy
    assert "after" not in problem.remedy


def test_a_job_that_ends_within_its_limit_can_be_waited_for():
    for restart in ("requeue", "nothing"):
        assert SubmitConfig(after="3", cluster=ClusterConfig(restart=restart)).problems() == []


def test_the_plan_is_compared_with_the_nodes(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["train", "name=x", *tiny]
    assert "strategy.name" in problems_of(submitted, run)
    assert "batch.tokens" in problems_of(submitted, [*run, "strategy=ddp", "nodes=3"])
    large = ["model=dense_3b", "model.vocab_size=512", "batch.tokens=4096", "strategy=ddp"]
    problems = problems_of(submitted, [*run, *large, "cluster.gpu_memory=40"])
    assert "GiB" in problems["cluster.gpu_memory"].reason
    submission = compose_submission([*run, *large, "strategy=fsdp"])
    from modtrain.cluster.submit import _problems

    assert _problems(submission) == []


def test_a_run_without_a_name_has_one_before_its_job_begins(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["train", *tiny, "gpus_per_node=1", f"runs_dir={tmp_path}"]
    names = []
    for _ in range(2):
        (task,) = compose_submission(words).tasks
        assert task.overrides[-1] == f'name="{task.config.name}"'
        assert task.directory == tmp_path / task.config.name
        names.append(task.config.name)
    assert [name.rpartition("-")[2] for name in names] == ["1", "2"]
    problems = problems_of(compose_submission, [*words, "max_time=30m"])
    assert problems["max_time"].remedy == "write time=…, the limit of the job"


def test_a_dry_run_writes_the_script_and_the_code(tiny, tmp_path):
    words = ["name=x", *tiny, "strategy=ddp", "cluster=cpu", "nodes=2", "batch.tokens=512"]
    done = run_modtrain("submit", "train", "--dry-run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/x"
    text = (run / "submit.sbatch").read_text()
    (code,) = (run / "code").iterdir()
    assert settings(text, "code", "run_directory") == [str(code), str(run)]
    assert (code / "slurm/job.sh").is_file()
    assert (code / "slurm/ending.sh").is_file()
    assert (code / "conf/train.yaml").is_file()
    assert (code / "modtrain/cli/main.py").is_file()
    assert json.loads((code / "VERSION.json").read_text()) is not None
    assert (run / "submitted.yaml").is_file()
    assert not (run / "jobs.jsonl").exists()
    # The run can be started in the directory that is there now.
    shown = run_modtrain("plan", *words[:-3], "batch.tokens=512", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr


def test_a_copy_of_the_code_is_never_changed(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.yaml").write_text("a: 1")
    first = freeze(tmp_path, own)
    assert freeze(tmp_path, own) == first
    (own / "train.yaml").write_text("a: 2")
    second = freeze(tmp_path, own)
    assert second != first
    assert (first / "own_conf/train.yaml").read_text() == "a: 1"
    assert (second / "own_conf/train.yaml").read_text() == "a: 2"


@given(st.text(max_size=80).filter(lambda text: "\0" not in text))
def test_a_jobs_name_is_plain(text):
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,60}", job_name(Path("/runs") / text))


def test_an_evaluation_has_a_name_of_its_own_and_does_not_wait_for_ever():
    task = ScriptTask("eval", ["run=x"], Path("/work dir"))
    text = render(a_job(task, SubmitConfig(after="7")))
    assert "#SBATCH --dependency=afterok:7" in text
    assert "#SBATCH --kill-on-invalid-dep=yes" in text
    assert "kill-on-invalid-dep" not in render(a_job(task))
    assert job_name(Path("runs/x"), "eval") == "x-eval" != job_name(Path("runs/x"))


@pytest.mark.parametrize(
    ("option", "line_of_it"),
    [
        ("--comment=hello world", '#SBATCH --comment="hello world"'),
        ("--comment='hello world'", "#SBATCH --comment='hello world'"),
        ("--exclude=node[7-9]", '#SBATCH --exclude="node[7-9]"'),
        ("--hold", "#SBATCH --hold"),
        ("-x node7", "#SBATCH -x node7"),
    ],
)
def test_an_options_value_is_one_word(option, line_of_it):
    config = SubmitConfig(cluster=ClusterConfig(options=[option]))
    assert line_of_it in render(a_job(config=config)).splitlines()


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ("", "no job that Slurm knows"),
        (line("4711", "FAILED", "NonZeroExitCode"), "FAILED"),
        (line("4711", "RUNNING"), None),
        (line("4711", "COMPLETED"), None),
    ],
)
def test_an_awaited_job_can_end_well(known, message, tmp_path, monkeypatch):
    from modtrain.cluster.submit import _after_problems

    play(monkeypatch, tmp_path, known)
    problems = _after_problems(SubmitConfig(after="4711"))
    assert [problem.key for problem in problems] == (["after"] if message else [])
    assert message is None or message in problems[0].reason


def test_a_container_sees_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["train", "name=x", "model=tiny", "budget.steps=2", "batch.tokens=256"]
    site = ["cluster=apptainer", "data.path=/elsewhere/shards", "gpus_per_node=1"]
    problem = problems_of(submitted, [*run, *site])["data.path"]
    assert "/shared/data" in problem.reason
    more = "cluster.mounts=['/elsewhere:/elsewhere:ro']"
    assert "outside" not in str(problems_of(submitted, [*run, *site, more]))


def test_a_container_sees_the_data_of_each_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["train", "name=x", "model=tiny", "budget.steps=2", "batch.tokens=256", "data=mixture"]
    sources = "+data.sources={a: {path: /elsewhere/a}, b: {path: /other/b}, c: {path: here}}"
    site = ["cluster=apptainer", "gpus_per_node=1", "cluster.mounts=[/other]"]
    problems = problems_of(submitted, [*run, sources, *site])
    assert list(problems) == ["data.sources.a.path"]
    assert problems["data.sources.a.path"].value == "/elsewhere/a"


@pytest.fixture
def limited(played):
    """An sbatch that takes two jobs, of the numbers 1 and 2."""
    (played / "bin/sbatch").write_text(
        f"#!/bin/sh\ncase $* in *test-only*) exit 0;; esac\ncd {played}; echo >>count\n"
        "n=$(wc -l <count)\n[ $n -le 2 ] || { echo QOSMaxSubmitJobPerUserLimit >&2; exit 1; }\n"
        "echo $n\n"
    )
    return played


def test_the_jobs_of_a_chain_are_submitted_all_or_none(tiny, limited):
    with pytest.raises(SlurmError, match=r"job 3 of chain=4; 1, 2: withdrawn"):
        submitted(["train", "name=x", *tiny, "cluster=cpu", "chain=4"])
    assert "scancel 1 2" in (limited / "bin/calls").read_text()
    assert (limited / "runs/x/CANCELLED").read_text() == "1\n2\n"


def test_every_job_of_a_chain_waits_for_the_awaited_one(tiny, limited):
    sbatch = limited / "bin/sbatch"
    sbatch.write_text(
        sbatch.read_text().replace("; echo >>count", '; echo >>count; echo "$*" >>asked')
    )
    (limited / "bin/output").write_text(line("9", "RUNNING", command=""))
    submitted(["train", "name=x", *tiny, "cluster=cpu", "chain=2", "after=9"])
    first, second = (limited / "asked").read_text().splitlines()
    # The first job has it from its script.
    assert "--dependency" not in first
    assert "--dependency=afterok:9,afterany:1 " in second


@pytest.mark.parametrize(
    "reason",
    [
        "PartitionTimeLimit",
        "Job's account not known, so it can't use this partition",
        "PartitionNodeLimit",
    ],
)
def test_a_job_that_cannot_start_is_withdrawn(reason, tiny, limited):
    (limited / "bin/output").write_text(line("1", "PENDING", reason, command=""))
    with pytest.raises(SlurmError, match=rf"never start: {reason}; 1: withdrawn\nremedy: "):
        submitted(["train", "name=x", *tiny, "cluster=cpu"])


def test_a_submitted_jobs_number_is_printed_where_slurm_answers_no_more(tiny, limited, capsys):
    squeue = "#!/bin/sh\n[ ! -e count ] || { echo Socket timed out on send/recv >&2; exit 1; }\n"
    (limited / "bin/squeue").write_text(squeue)
    submitted(["train", "name=x", *tiny, "cluster=cpu"])
    output = capsys.readouterr().out
    assert "submitted job 1\nwarning: " in output
    assert "Socket timed out" in output
    assert "modtrain cancel" in output


def test_a_complete_run_takes_no_nodes(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/x").mkdir(parents=True)
    for name in ("COMPLETED", "result.json"):
        (tmp_path / "runs/x" / name).touch()
    problem = problems_of(submitted, ["train", "name=x", *tiny, "cluster=cpu"])["name"]
    assert "complete" in problem.reason


def directives_of(config: SubmitConfig, verb: str = "train") -> list[str]:
    lines = render(a_job(ScriptTask(verb, [], Path("run")), config)).splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


@pytest.mark.parametrize(
    ("site", "job", "option"),
    [
        ({"exclude": ["node7", "gpu[12-14]"]}, {}, '--exclude="node7,gpu[12-14]"'),
        ({"comment": "my study"}, {}, '--comment="my study"'),
        ({"mail": "me@example.org"}, {}, "--mail-type=FAIL"),
        ({"mail": "me", "mail_on": ["END", "FAIL"]}, {}, "--mail-type=END,FAIL"),
        ({}, {"begin": "now+2hours"}, "--begin=now+2hours"),
        ({"gpu_request": "per_task"}, {}, "--gpus-per-task=1"),
        ({"gpu_request": "per_task", "launcher": "torchrun"}, {}, "--gpus-per-task=8"),
        ({"gpu_request": "per_task", "gpu_type": "h100"}, {}, "--gpus-per-task=h100:1"),
    ],
)
def test_an_option_of_sbatch_has_a_key(site, job, option):
    config = SubmitConfig(cluster=ClusterConfig(**site), **job)
    assert config.problems() == []
    directives = directives_of(config)
    assert option in directives
    assert ("--gpus-per-node=8" in directives) == ("gpu_request" not in site)
    assert option not in directives_of(SubmitConfig())


@pytest.mark.parametrize(
    ("key", "site", "job"),
    [
        ("cluster.exclude", {"exclude": ["node7 node8"]}, {}),
        ("cluster.exclude", {"exclude": ["--nodelist=x"]}, {}),
        ("cluster.mail", {"mail": "a b@c"}, {}),
        ("cluster.mail", {"mail": "--uid=0"}, {}),
        ("cluster.mail_on", {"mail_on": ["SOMETIMES"]}, {}),
        ("cluster.gres", {"gpu_request": "per_task", "gres": "gpu"}, {}),
        ("cluster.gpu_request", {"gpu_request": "per_job"}, {}),
        ("cluster.srun_options", {"srun_options": ["mpi=none"]}, {}),
        ("cluster.srun_options", {"srun_options": ["--ntasks=3"]}, {}),
        ("cluster.srun_options", {"srun_options": ["-n3"]}, {}),
        ("cluster.srun_options", {"srun_options": ["--cpu-bind cores"]}, {}),
        ("cluster.srun_options", {"srun_options": ["--mpi=none\nrm"]}, {}),
        ("cluster.on_given_up", {"on_given_up": ["tell\nme"]}, {}),
        ("cluster.log_size", {"log_size": 0}, {}),
        ("begin", {}, {"begin": "tonight"}),
        ("begin", {}, {"begin": "1200"}),
        ("workers", {}, {"workers": 0}),
        ("chain", {}, {"chain": "2", "workers": 2}),
    ],
)
def test_a_wrong_value_of_such_a_key_is_reported(key, site, job):
    problems = SubmitConfig(cluster=ClusterConfig(**site), **job).problems()
    assert [problem.key for problem in problems] == [key]


@pytest.mark.parametrize(
    "begin", ["now", "now+90", "now+1day", "20:00", "9:30:15", "2026-12-24", "2026-12-24T18:00"]
)
def test_slurms_times_are_taken(begin):
    assert SubmitConfig(begin=begin).problems() == []


def test_options_of_srun_and_the_program_reach_the_script_as_they_are():
    nasty = ["/bin/tell me", "$(touch pwned)", "a'b"]
    site = ClusterConfig(srun_options=["--mpi=none", "--cpu-bind=v,cores"], on_given_up=nasty)
    text = render(a_job(config=SubmitConfig(cluster=site)))
    check(text, "it")
    assert settings(text, "srun_options", "on_given_up") == [
        *("--mpi=none", "--cpu-bind=v,cores"),
        *nasty,
    ]
    # Each process has to see all GPUs of its node, unless the site says otherwise.
    site = ClusterConfig(gpu_request="per_task")
    assert settings(render(a_job(config=SubmitConfig(cluster=site))), "srun_options") == [
        "--gpu-bind=none"
    ]
    site = ClusterConfig(gpu_request="per_task", srun_options=["--gpu-bind=closest"])
    assert settings(render(a_job(config=SubmitConfig(cluster=site))), "srun_options") == [
        "--gpu-bind=closest"
    ]


def test_nccl_and_gloo_may_have_interfaces_of_their_own():
    def variables(**site):
        config = SubmitConfig(cluster=ClusterConfig(**site))
        return settings(render(a_job(config=config)), "variables")

    both = ["NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"]
    assert variables(network_interface="ib0") == both
    assert variables(network_interface="ib0", gloo_interface="eth0") == [
        *both[:1],
        "GLOO_SOCKET_IFNAME=eth0",
    ]
    assert variables(nccl_interface="ib0") == both[:1]
    given = {"NCCL_SOCKET_IFNAME": "mine"}
    assert variables(nccl_interface="ib0", environment=given) == ["NCCL_SOCKET_IFNAME=mine"]


def test_workers_of_a_search_are_an_array(tiny):
    words = ["study=s", "space.model.capacity=interval(0.1,0.5)", *tiny]
    submission = compose_submission(["search", *words, "workers=4", "at_once=2", "cluster=cpu"])
    directives = directives_of(submission.config, "search")
    assert "--array=0-3%2" in directives
    text = render(a_job(submission.tasks[0], submission.config))
    assert "case" not in text.split("# --- end of settings")[0]
    problems = problems_of(compose_submission, ["train", "name=x", *tiny, "workers=2"])
    assert "a search alone" in problems["workers"].remedy


def test_what_is_waited_for_may_be_named(tiny, tmp_path, played):
    directory = tmp_path / "runs/prepare-x"
    directory.mkdir(parents=True)
    (directory / "jobs.jsonl").write_text('{"job": "3"}\n{"job": "4711"}\n')
    submitted(["train", "name=x", *tiny, "cluster=cpu", "after=prepare-x"])
    assert "--dependency=afterok:4711" in (tmp_path / "runs/x/submit.sbatch").read_text()


def test_a_complete_run_is_not_waited_for(tiny, tmp_path, played, capsys):
    directory = tmp_path / "runs/first"
    directory.mkdir(parents=True)
    for name in ("COMPLETED", "result.json"):
        (directory / name).touch()
    submitted(["train", "name=x", *tiny, "cluster=cpu", "after=first"])
    assert "--dependency" not in (tmp_path / "runs/x/submit.sbatch").read_text()
    assert "runs/first is complete: nothing to wait for" in capsys.readouterr().out


def test_data_that_another_job_prepares_need_not_be_there(tiny, tmp_path, played, capsys):
    words = ["train", "name=x", *tiny, "cluster=cpu", "data.path=data/later"]
    assert "data.path" in problems_of(submitted, words)
    words.append("after=4711")
    # What can be seen without the data is wrong all the same, and with their sizes the plan.
    assert "model.capacity" in problems_of(submitted, [*words, "model.capacity=2"])
    sizes = ["data.seq_len=32", "model.vocab_size=300"]
    assert "batch.tokens" in problems_of(submitted, [*words, *sizes, "batch.tokens=50"])
    assert not (tmp_path / "runs").exists()
    submitted(words)
    assert "data/later is not there yet" in capsys.readouterr().out
    assert "--dependency=afterok:4711" in (tmp_path / "runs/x/submit.sbatch").read_text()
