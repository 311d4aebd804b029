"""A Slurm cluster, asked as a person would: with sbatch, squeue, scancel, scontrol and sinfo."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from balancer.errors import ConfigError
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.typed import last_line, typed

# Seconds that Slurm gets to answer. Its commands themselves try for a while before they say that nobody does.
ANSWER = 60.0
_SILENT = "Slurm does not answer within {:.0f} s"
# What the commands say if slurmctld is not there, or not able to work; anything else is an answer.
_SILENCE = re.compile(
    r"contact slurm controller|timed out|Zero Bytes|Connection (refused|reset)|does not answer within|in standby"
    r"|temporarily unable|Unable to establish|Munge|munge|authentication credential|Transport endpoint",
)
_UNKNOWN = re.compile(r"Invalid job id", re.IGNORECASE)
_OVER_ALREADY = re.compile(r"Invalid job id|already complet", re.IGNORECASE)
# What a job needs of our own environment to be submitted: not what may hold a secret, which Slurm would write down.
_PLAIN = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SLURM_CONF"}
# Variables of a user's own by which Slurm's commands list or end other jobs than we mean.
_OTHERS_DEFAULTS = ("SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
# Which cluster sbatch goes to, and all of the commands.
_SBATCH_CLUSTERS, _CLUSTERS = "SBATCH_CLUSTERS", "SLURM_CLUSTERS"
_COLUMNS = "%i|%T|%r|%N|%P|%L|%M|%k"
_GPUS = re.compile(r"(?:^|,)gpu(?::([A-Za-z_][^:,()]*))?:(\d+)")
# The states of a job that is over.
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
# Those in which Slurm or somebody else ended it, and not its own fault.
_BLAMELESS = {"BOOT_FAIL", "CANCELLED", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT"}


class Silent(CannotStart):
    """Slurm does not answer: what runs goes on, and nobody knows about it. The message says why."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a job's comment says: whose replica it is, of which start, and where it listens once it does.

    `of` stands for the service's folder: two of a user's services may have the same name in different folders.
    """

    of: str
    id: int
    version: int
    digest: str
    start: str
    at: str = ""

    @property
    def text(self) -> str:
        """The comment before the replica has an address; replica/announce.py adds that."""
        return f"groundserve,of={self.of},id={self.id},version={self.version},digest={self.digest},start={self.start}"

    @classmethod
    def of_text(cls, text: str) -> Self | None:
        """None if it is no comment of ours."""
        word, *pairs = text.split(",")
        said = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if word != "groundserve":
            return None
        try:
            at = said.get("at", "")
            return cls(said["of"], int(said["id"]), int(said["version"]), said["digest"], said["start"], at)
        except (LookupError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Job:
    """One job as squeue lists it. Times are in seconds; `left` is None where there is no limit."""

    id: str
    state: str
    reason: str
    node: str
    partition: str
    left: float | None
    ran: float
    mark: Mark

    @property
    def is_queued(self) -> bool:
        return self.state == "PENDING"

    @property
    def has_several_nodes(self) -> bool:
        """Then `node` is Slurm's pattern for them, as in h[1-2],login."""
        return "[" in self.node or "," in self.node

    @property
    def is_ending(self) -> bool:
        return self.state == "COMPLETING"


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended. `code` is its exit code, or 128 + the signal that ended it."""

    state: str
    code: int
    limit: str

    @property
    def is_blameless(self) -> bool:
        return self.state in _BLAMELESS


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a partition: its GPUs by type ("" where Slurm knows none), and how many of them jobs have."""

    name: str
    partition: str
    is_default: bool
    state: str
    gpus: Mapping[str, int]
    used: int

    @property
    def takes_jobs(self) -> bool:
        return self.state.rstrip("*~#!%$@^-+") in ("idle", "mixed", "allocated", "completing", "planned")


class Cluster:
    """The jobs of one name on the cluster whose commands are on our PATH."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def submit(self, script: str, flags: Sequence[str], folder: str) -> str:
        """Submits a batch script, and returns the job's id. Raises Silent, or CannotStart with sbatch's own words."""
        environ = environ_of_jobs(os.environ)
        command = ["sbatch", "--parsable", "--no-requeue", f"--job-name={self.name}", f"--chdir={folder}", *flags]
        said = await _asked(command, script, environ)
        return said.strip().split(";")[0]

    async def jobs(self) -> list[Job]:
        """All that are queued, run or end now. Raises Silent."""
        return list(_jobs(await _asked(_listing(self.name))))

    async def end_of(self, job: str) -> End | None:
        """How it ended; None while it has not. Raises Silent. One that is forgotten already is COMPLETED."""
        try:
            said = await _asked(["scontrol", "show", "job", job, "--oneliner"])
        except Silent:
            raise
        except CannotStart as failure:
            if _UNKNOWN.search(str(failure)):
                return End("COMPLETED", 0, "")
            raise Silent(str(failure)) from None
        facts = dict(word.split("=", 1) for word in said.split() if "=" in word)
        state = facts.get("JobState", "")
        if state not in _OVER:
            return None
        code, _, number = facts.get("ExitCode", "0:0").partition(":")
        return End(
            state, 128 + int(number) if number.isdecimal() and int(number) else int(code), facts.get("TimeLimit", "")
        )

    async def terminate(self, job: str, is_one_node: bool = True) -> None:
        """SIGTERM to all of its processes. Raises CannotStart, like `cancel`, if Slurm does not do it."""
        # Without --full only srun's processes get it. srun itself would end them at once.
        await self._cancel(*(["--full"] if is_one_node else []), "--signal=TERM", job)

    async def cancel(self, job: str) -> None:
        """Takes it out of the queue, or ends it: SIGTERM, and SIGKILL after Slurm's KillWait."""
        await self._cancel(job)

    async def nodes_to_empty(self) -> dict[str, str]:
        """What an administrator drains or says will fail: for each node, a line with the reason. Raises Silent."""
        said = await _asked(["sinfo", "--all", "--noheader", "--Node", "--states=drain,fail", "--format=%N|%T|%E"])
        lines = [line.strip().split("|", 2) for line in said.splitlines() if line.count("|") >= 2]
        return {node: f"Slurm says that {node} is {state}: {reason}" for node, state, reason in lines}

    async def allow(self, job: str, exclude: Sequence[str]) -> None:
        """Lets a queued job have all nodes but those of sbatch's flag `exclude`. Raises Silent."""
        nodes = "".join(flag.removeprefix("--exclude=") for flag in exclude)
        try:
            await _asked(["scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}"])
        except Silent:
            raise
        except CannotStart:
            pass  # it has started meanwhile

    async def _cancel(self, *words: str) -> None:
        try:
            await _asked(["scancel", *words])
        except CannotStart as failure:
            if not _OVER_ALREADY.search(str(failure)):
                raise

    async def addresses(self) -> dict[str, str]:
        """Of all nodes that Slurm itself reaches. Raises Silent."""
        said = await _asked(["sinfo", "--all", "--noheader", "--Node", "--responding", "--format=%N|%o"])
        return dict(line.strip().split("|", 1) for line in said.splitlines() if "|" in line)

    async def state_of(self, node: str) -> str:
        """Like MIXED, IDLE+DRAIN or DOWN+NOT_RESPONDING; empty if Slurm does not say."""
        try:
            said = await _asked(["scontrol", "show", "node", node, "--oneliner"])
        except CannotStart:
            return ""
        return next((word.removeprefix("State=") for word in said.split() if word.startswith("State=")), "")


def nodes() -> list[Node]:
    """All nodes, once for each partition that they are in. Raises ConfigError if there is no Slurm here."""
    widths = (64, 64, 48, 256, 256)
    names = ("Partition", "NodeList", "StateLong", "Gres", "GresUsed")
    columns = ",".join(f"{name}:{width}" for name, width in zip(names, widths, strict=True))
    found = []
    for line in answered("sinfo", "--all", "--noheader", "--Node", f"--Format={columns}").splitlines():
        if not line.strip() or line.startswith("CLUSTER: "):
            continue  # so begins the list of a cluster that was named
        cells, at = [], 0
        for width in widths:
            cells.append(line[at : at + width].strip())
            at += width
        partition, name, state, gres, used = cells
        held = sum(_gpus(used).values())
        found.append(Node(name, partition.rstrip("*"), partition.endswith("*"), state, _gpus(gres), held))
    return found


def remove_jobs(name: str, of: str) -> None:
    """Ends all jobs of this name whose comment says so; raises ConfigError."""
    said = answered(*_listing(name))
    if mine := [job.id for job in _jobs(said) if job.mark.of == of]:
        answered("scancel", *mine)


def answered(*command: str) -> str:
    """What it prints; raises ConfigError if it fails, or is not here."""
    if shutil.which(command[0]) is None:
        raise ConfigError(f"there is no {command[0]} on the PATH: --on slurm is for a host where Slurm's commands are")
    environ = environ_of_commands(os.environ)
    try:
        done = subprocess.run(
            command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, timeout=ANSWER,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(_SILENT.format(ANSWER)) from None
    if done.returncode != 0:
        raise ConfigError(f"Slurm: {last_line(done.stderr, command[0])}")
    return done.stdout


async def _asked(command: Sequence[str], given: str = "", environ: Mapping[str, str] | None = None) -> str:
    try:
        return await typed(command, environ or environ_of_commands(os.environ), ANSWER, _SILENT, given)
    except CannotStart as failure:
        raise Silent(str(failure)) if _SILENCE.search(str(failure)) else CannotStart(str(failure)) from None


def environ_of_commands(environ: Mapping[str, str]) -> dict[str, str]:
    """Our variables, for all commands but sbatch. They go to the cluster that sbatch submits to, and list all jobs.

    Raises ConfigError for several clusters: the id of a job says nothing without its cluster.
    """
    cluster = _cluster(environ)
    ours = {name: value for name, value in environ.items() if not name.startswith(_OTHERS_DEFAULTS)}
    return {**ours, _CLUSTERS: cluster} if cluster else ours


def environ_of_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of our variables that sbatch gets, and with it the job. Raises ConfigError likewise."""
    # Not SLURM_CLUSTERS, which the job's own scontrol would heed.
    cluster = _cluster(environ)
    ours = {name: value for name, value in environ.items() if name in _PLAIN or name.startswith("SBATCH_")}
    return {**ours, _SBATCH_CLUSTERS: cluster} if cluster else ours


def _cluster(environ: Mapping[str, str]) -> str:
    """The cluster that the user's variables name; empty if they name none."""
    variable = next((name for name in (_SBATCH_CLUSTERS, _CLUSTERS) if environ.get(name)), "")
    cluster = environ.get(variable, "").strip()
    if "," in cluster or cluster.lower() == "all":
        raise ConfigError(f"{variable}={cluster}: all jobs of a service are on one cluster: name that one there")
    return cluster


def _listing(name: str) -> list[str]:
    """Our jobs of this name, also those in partitions that are hidden."""
    return ["squeue", "--all", "--me", "--noheader", f"--name={name}", f"--format={_COLUMNS}"]


def _jobs(said: str) -> Iterator[Job]:
    for line in said.splitlines():
        cells = line.strip().split("|", 7)
        mark = Mark.of_text(cells[7]) if len(cells) == 8 else None
        if mark is not None:
            id, state, reason, node, partition, left, ran = cells[:7]
            yield Job(id, state, reason, node, partition, seconds(left), seconds(ran) or 0.0, mark)


def _gpus(gres: str) -> dict[str, int]:
    """The GPUs in `gpu:2`, `gpu:a100:4(S:0-1),gpu:t4:1`, `gpu:a100:1(IDX:0)`, by type."""
    found: dict[str, int] = {}
    for kind, count in _GPUS.findall(gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def seconds(text: str) -> float | None:
    """From Slurm's days-hours:minutes:seconds; None for UNLIMITED, INVALID and the like."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text.strip())
    if parts is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def is_gone(state: str) -> bool:
    """Is a node in this state taken for gone by Slurm itself?"""
    return "DOWN" in state or "NOT_RESPONDING" in state or "*" in state or "FAIL" in state
