"""A real Slurm of a few virtual nodes on this machine, for as long as a test needs it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
# What modtrain needs on a node.
HERE = {"PYTHONPATH": str(ROOT), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
MINISLURM = Path(__file__).with_name("minislurm")
NUM_NODES = 3
# Seconds. It ends what hangs; where it was shorter, a busy machine was too slow for it.
PATIENCE = 480.0
ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"),
    *("DEADLINE", "OUT_OF_MEMORY"),
)
# Quicker than Slurm's own, and slow enough for processors that many share.
_CONF = """
SlurmdTimeout=15
SlurmctldTimeout=10
KillWait=5
BatchStartTimeout=60
MessageTimeout=30
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_delay=0
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60 MaxTime=INFINITE
"""


def missing() -> str | None:
    """Return why no cluster can be had here; None where it can."""
    if os.name != "posix" or not Path("/proc/self/ns").exists():
        return "Linux namespaces are needed"
    if os.geteuid() != 0:
        return "only root may make network and mount namespaces: run as root"
    tools = [tool for tool in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} missing: apt install util-linux iproute2"
    if not is_installed() and shutil.which("apt-get") is None:
        return "Slurm is missing, and there is no apt-get to fetch it"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"no right to make namespaces (a container needs --privileged): {tried.stderr}"
    return None


def is_installed() -> bool:
    """Whether Slurm's daemons are here already."""
    return shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is not None


def missing_accounting() -> str | None:
    """Return why no cluster with accounting and several users can be had; None where it can."""
    if (reason := missing()) is not None:
        return reason
    if shutil.which("apt-get") is None:
        path = f"{os.environ['PATH']}:/usr/sbin"
        tools = [tool for tool in ("slurmdbd", "mariadbd") if shutil.which(tool, path=path) is None]
        if tools:
            return f"{', '.join(tools)} missing, and there is no apt-get to fetch them"
    return None


def process_tracking() -> str:
    """Return what tracks a step's processes: cgroups, as on real clusters, where there are some."""
    return "cgroup" if os.access("/sys/fs/cgroup/freezer", os.W_OK) else "linuxproc"


class Cluster:
    """Nodes ``node1`` to ``nodeN`` with fake GPUs; commands run on the login node.

    Partitions: ``main`` (the default; its jobs get SIGTERM and 20 s when they are preempted),
    ``low`` (the same with 60 s), and ``high``, which preempts both.
    """

    def __init__(
        self,
        directory: Path,
        num_nodes: int = NUM_NODES,
        share_mb: int = 0,
        conf: str = "",
        users: Sequence[str] = (),
    ) -> None:
        """Start it; `down` is to be called, and happens by itself when this process ends.

        share_mb: size of `share`, a file system of its own, which all nodes have mounted.
        conf: more lines of slurm.conf; of a setting's several lines the last one counts.
        users: beside root, in the account ``lab``; with some the cluster has accounting, and
            tracks processes by cgroups where it can.

        Raises:
            RuntimeError: it did not start; with the reason.
        """
        self.directory = directory
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.share = directory / "share"
        self._scripts = directory / "scripts"
        lines = directory.with_name(directory.name + ".conf")
        lines.write_text(_CONF + conf)
        watched, self._lifeline = os.pipe()
        self._environment = {
            **os.environ,
            "MINISLURM_DIR": str(directory),
            "MINISLURM_NODES": str(num_nodes),
            "MINISLURM_CONF": str(lines),
            "MINISLURM_SHARE_MB": str(share_mb),
            "MINISLURM_LIFELINE": str(watched),
            "MINISLURM_PROCTRACK": process_tracking() if users else "linuxproc",
            "MINISLURM_ACCOUNTING": "1" if users else "0",
            "MINISLURM_USERS": " ".join(users),
            # Of the interpreter and the code, which may lie in the home of root.
            "MINISLURM_OPEN": f"{sys.base_prefix}:{sys.prefix}:{ROOT}" if users else "",
            "MINISLURM_WAIT": "300" if users else "60",
        }
        try:
            started = self._minislurm("up", timeout=600, pass_fds=(watched,))
        finally:
            os.close(watched)
            lines.unlink()
        if started.returncode:
            self.down()
            raise RuntimeError(f"no Slurm cluster: {started.stdout}{started.stderr}")
        self._scripts.mkdir()

    def down(self) -> None:
        """End everything that runs on it, and remove it."""
        self._minislurm("down", timeout=60)
        with suppress(OSError):
            os.close(self._lifeline)
        self._lifeline = -1
        shutil.rmtree(self.directory, ignore_errors=True)

    # ---- jobs

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        user: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, and return what it printed.

        env: variables on top of this process's. user: one of the cluster's; None: root.

        Raises:
            AssertionError: it failed, and ``check``.
        """
        if user is not None:
            env = {**(env or {}), "HOME": str(self.home(user)), "USER": user, "LOGNAME": user}
            command = (
                *("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"),
                *command,
            )
        done = self._minislurm("exec", *map(str, command), env=env, cwd=cwd, timeout=timeout)
        assert not (check and done.returncode), f"{command}: {done.stdout}{done.stderr}"
        return done

    def home(self, user: str) -> Path:
        """Return a user's home, which all nodes see."""
        return self.directory / "home" / user

    def modtrain(self, cwd: Path, *words: str, **options: Any) -> str:
        """Run a command of modtrain on the login node, and return what it printed."""
        options = {"env": HERE, **options}
        return self.run(sys.executable, "-m", "modtrain", *words, cwd=cwd, **options).stdout

    def sbatch(
        self,
        script: str | Path,
        *options: str,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Submit a script, a file or its text, and return the job's id.

        options: sbatch's. arguments: the script's own.
        """
        if isinstance(script, str) and script.startswith("#!"):
            text, script = script, self._scripts / f"{len(list(self._scripts.iterdir()))}.sbatch"
            script.write_text(text)
        command = ["sbatch", "--parsable", *options, str(script), *arguments]
        return self.run(*command, env=env, cwd=cwd).stdout.strip().split(";")[0]

    def details(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` prints of a job or of one task of an array."""
        output = self.run("scontrol", "--oneliner", "show", "job", job, timeout=60).stdout
        line = output.splitlines()[0] if output else ""
        # A value may hold spaces; the next name ends it.
        return dict(re.findall(r"([A-Z][\w/:]*)=(.*?)(?=\s[A-Z][\w/:]*=|\s*$)", line))

    def state(self, job: str) -> str:
        """Return a job's state, as PENDING, RUNNING or FAILED."""
        return self.details(job)["JobState"]

    def wait(self, job: str, *states: str, timeout: float = PATIENCE) -> str:
        """Wait until a job is in one of the states and return it; none given: until it has ended.

        Raises:
            AssertionError: it is not in time, or the job ended otherwise; with its output.
        """
        wanted, deadline, state = states or ENDED, time.monotonic() + timeout, "unknown"
        while time.monotonic() < deadline:
            # The controller may be away.
            with suppress(AssertionError, KeyError, subprocess.TimeoutExpired):
                state = self.state(job)
                if state in wanted:
                    return state
                if state in ENDED:
                    break
            time.sleep(0.3)
        raise AssertionError(f"job {job} is {state}, not {wanted}:\n{self.output(job)}")

    def output(self, job: str) -> str:
        """Return what the job's batch script has written so far."""
        with suppress(AssertionError):
            path = Path(self.details(job).get("StdOut", "/dev/null"))
            return path.read_text(errors="replace") if path.is_file() else ""
        return "its output cannot be found: Slurm knows nothing of it"

    def cancel_all(self) -> None:
        """Cancel every job and wait until the nodes are free of them."""
        ids = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if ids:
            self.run("scancel", *ids, check=False)
        deadline = time.monotonic() + PATIENCE
        while self.run("squeue", "--noheader").stdout and time.monotonic() < deadline:
            time.sleep(0.1)

    # ---- what befalls it

    def on(self, node: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a compute node, as its root."""
        return self._minislurm("on", node, *command, timeout=60)

    def kill_node(self, name: str) -> None:
        """Cut a node's power."""
        self._checked("kill", name)

    def start_node(self, name: str) -> None:
        """Power a node on again."""
        self._checked("start", name)

    def kill_slurmd(self, name: str) -> None:
        """Kill a node's daemon alone: its jobs keep running."""
        killed = self.on(name, "bash", "-c", f"kill -9 $(cat {self._pid_of(f'slurmd-{name}')})")
        assert not killed.returncode, killed.stderr

    def start_slurmd(self, name: str) -> None:
        """Start a node's daemon again."""
        started = self.on(
            name, "env", f"SLURM_CONF={self.directory}/slurm.conf", "slurmd", "-N", name
        )
        assert not started.returncode, started.stderr

    def kill_controller(self) -> None:
        """End the controller: nothing is scheduled, and commands fail.

        It writes its state down first: jobs of the last seconds would be lost, as they would on
        any cluster, and a test of them would show nothing about modtrain.
        """
        pid = self._pid_of("slurmctld").read_text().strip()
        wait_for_exit = (
            f"for _ in {{1..200}}; do [ -e /proc/{pid} ] || exit 0; sleep .05; done; exit 1"
        )
        self.run("bash", "-c", f"kill {pid}; {wait_for_exit}")

    def start_controller(self) -> None:
        """Start the controller again."""
        self.run("slurmctld")

    def wait_for_nodes(self, timeout: float = PATIENCE) -> None:
        """Wait until all nodes are up."""
        deadline = time.monotonic() + timeout
        while (status := self._minislurm("status", timeout=60)).returncode:
            assert time.monotonic() < deadline, status.stdout
            time.sleep(0.2)

    @contextmanager
    def share_removed(self) -> Iterator[None]:
        """Take the shared file system away: paths are not there, open files still work."""
        self.run("umount", "--lazy", self.share)
        try:
            yield
        finally:
            # The same file system, as long as any process has a file open in it.
            image = self.directory / "share.ext4"
            device = self.run("losetup", "-n", "-O", "NAME", "-j", image, check=False)
            devices = device.stdout.split()
            source = ["-o", "rw", devices[0]] if devices else ["-o", "loop", str(image)]
            self.run("mount", *source, self.share)

    @contextmanager
    def share_frozen(self) -> Iterator[None]:
        """Block writes to the shared file system, as a server does that is away."""
        self.run("fsfreeze", "--freeze", self.share)
        try:
            yield
        finally:
            self.run("fsfreeze", "--unfreeze", self.share)

    @contextmanager
    def share_full(self) -> Iterator[None]:
        """Fill the shared file system to its last block, and whatever becomes free meanwhile."""
        filler = self.share / "filler"
        fill = f"while :; do cat /dev/zero >>{filler} 2>/dev/null; sleep .05; done"
        command = [MINISLURM, "exec", "bash", "-c", fill]
        filling = subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL)
        try:
            while self._free_kb() > 0:
                time.sleep(0.05)
            yield
        finally:
            # The shell with it, which dies with the process that entered the login node.
            filling.kill()
            filling.wait()
            self.run("rm", filler)

    def _free_kb(self) -> int:
        output = self.run("df", "--block-size=1K", "--output=avail", self.share).stdout
        return int(output.split()[-1])

    def seen(self, path: Path) -> Path:
        """Return by what path this process, which is on no node, sees one that the nodes have."""
        pid = (self.directory / "login.pid").read_text().split()[0]
        return Path(f"/proc/{pid}/root{path}")

    # ---- minislurm

    def _pid_of(self, daemon: str) -> Path:
        return self.directory / f"run/{daemon}.pid"

    def _checked(self, *arguments: str) -> None:
        done = self._minislurm(*arguments, timeout=60)
        assert not done.returncode, done.stderr

    def _minislurm(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [MINISLURM, *arguments],
            env={**self._environment, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            pass_fds=pass_fds,
            check=False,
        )


@contextmanager
def cluster_of(
    num_nodes: int = NUM_NODES, share_mb: int = 0, conf: str = "", users: Sequence[str] = ()
) -> Iterator[Cluster]:
    """A cluster for the length of the block, in a directory of its own."""
    # Unix sockets want short paths, which pytest's are not.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    directory = Path(tempfile.mkdtemp(prefix=f"minislurm-{worker}-", dir="/tmp"))
    cluster = Cluster(directory, num_nodes, share_mb, conf, users)
    try:
        yield cluster
    finally:
        cluster.down()
