"""The Slurm engine: each replica is a job. The balancer runs here, beside the controller; replicas outlive both.

A job's comment says whose replica it is, and where it listens. One squeue every two seconds tells of all of them.
"""

import asyncio
import contextlib
import hashlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.engines import rotation
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.child import tail
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.engines.local.front import Front
from balancer.operate.engines.slurm import room
from balancer.operate.engines.slurm.batch import Batch, Place, batch, excluding, places, remove, surroundings
from balancer.operate.engines.slurm.cluster import Cluster, End, Job, Mark, Silent, remove_jobs
from balancer.operate.engines.slurm.nodes import HostWatch, Nodes
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.schema import MOST_REPLICAS, Slurm

# Seconds between two looks at the queue.
_LOOK = 2.0
# Seconds in the queue after which it is said that a replica waits there: Slurm takes its time even where all is free.
_QUEUED = 10.0
# Seconds after its cancellation in which a job has ended, or its node is not there to end it: KillWait, and more.
_UNTIL_GONE = 60.0
# The last lines of a log, among which is the reason of an end; and what comes after that where a job has several parts.
_TOLD = 30
_AFTERWARDS = re.compile(
    r"slurmstepd|srun: (Force Terminated|Terminating|launch/|Job step aborted|error: .*Exited with exit code)"
)


@dataclass(slots=True)
class _Replica:
    mark: Mark
    words: FirstWords
    hosts: HostWatch
    begun: float  # loop time, in seconds, as all times here
    batch: Batch | None = None  # None for one that an earlier controller started
    asked: Slurm | None = None
    job_id: str = ""
    job: Job | None = None  # as squeue had it last
    seen_at: float = 0.0
    is_submitting: bool = False
    avoids: frozenset[str] = frozenset()  # nodes that the file does not exclude, and this job was told to
    is_stopping: bool = False
    has_to_move: str = ""  # why, if one of its nodes is to be emptied
    over: asyncio.Event = field(default_factory=asyncio.Event)


class SlurmEngine:
    """An `Engine` that keeps logs, keys and what jobs are to start in `folder`, on the shared file system."""

    name = "slurm"
    most_replicas = MOST_REPLICAS
    outlives_controller = True
    is_kept_up = False

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        self._folder = folder
        self._front = Front(folder, self.changed.set)
        self._cluster = Cluster(_name_of(folder))
        self._of = _of(folder)
        self._replicas: dict[int, _Replica] = {}
        self._ended: list[Ended] = []
        self._watching: asyncio.Task[None] | None = None
        self._silence = ""
        self._nodes = Nodes(self._cluster)
        self._cancelled: dict[str, float] = {}  # jobs that are none of our replicas any more, and when that was said

    def suits(self, recipe: Recipe) -> bool:
        """Never unasked: a host with Slurm's commands may have GPUs of its own."""
        return False

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        self._front.check_keys(recipe)
        made, warnings = room.fit(recipe)
        return replace(made, surroundings=surroundings(recipe)), warnings

    def placement(self, recipe: Recipe) -> list[str]:
        return room.described(recipe)

    def take_down(self) -> None:
        remove_jobs(self._cluster.name, self._of)
        shutil.rmtree(self._folder.path / "jobs", ignore_errors=True)

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None = None) -> Addresses:
        if left is not None and flags.join is None:
            flags = replace(flags, listen=flags.listen or left.listen, admin=flags.admin or left.admin)
        return self._front.prepare(recipe, flags)

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        return self._front.balancer(recipe)

    @property
    def fields(self) -> Mapping[str, str]:
        return self._front.fields

    async def found(self) -> tuple[Survivor, ...]:
        """Of two jobs for one replica, the earlier was being stopped."""
        now = _now()
        for job in sorted(await self._cluster.jobs(), key=lambda job: int(job.id) if job.id.isdecimal() else 0):
            if job.mark.of != self._of or job.is_ending:
                continue
            other = self._replicas.get(job.mark.id)
            if other is not None and other.job_id != job.id:  # it is, if an earlier attempt broke off
                await self._cluster.cancel(other.job_id)
            log = self._folder.replica_log(job.mark.id)
            if not job.is_queued:
                with contextlib.suppress(OSError):
                    rotation.take_back(log)  # which was set aside when this controller began
            words = FirstWords(log) if job.is_queued else FirstWords.of_running(log)
            self._replicas[job.mark.id] = _Replica(
                job.mark, words, self._watched(), now - job.ran, job_id=job.id, job=job, seen_at=now
            )
        await self._nodes.look()
        self._note_who_has_to_move()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return tuple(
            Survivor(id, replace(self._listing(id, one), version=one.mark.version), one.mark.digest)
            for id, one in self._replicas.items()
        )

    async def start(self, id: int, recipe: Recipe) -> None:
        mark = Mark(self._of, id, recipe.version, recipe.digest, secrets.token_hex(4))
        log = self._folder.replica_log(id)
        self._folder.trim_replica_logs({id, *self._replicas})
        made = batch(recipe, mark, self._file_of(mark), log, self._front.key_variable(recipe))
        words = FirstWords(log)
        self._replicas[id] = one = _Replica(mark, words, self._watched(), _now(), made, recipe.spec.operation.slurm)
        try:
            await self._submit(one)
        except BaseException:
            self._forget(id)
            raise

    async def _submit(self, one: _Replica) -> None:
        """If Slurm is silent, the watch tries again. It may have heard us all the same: then squeue shows the job."""
        assert one.batch is not None
        one.is_submitting = True
        flags = [*one.batch.flags, f"--comment={one.mark.text}"]
        shunned = self._nodes.shunned()
        try:
            while not one.job_id:
                one.avoids = frozenset(shunned)
                exclude = excluding(one.asked, shunned)
                try:
                    one.job_id = await self._cluster.submit(
                        one.batch.script, [*flags, *exclude], str(self._folder.path)
                    )
                except Silent as failure:
                    self._hush(failure)
                    break
                except CannotStart:
                    if not shunned:
                        raise
                    # There may be too few others; the one that was lost first is the likeliest to be back.
                    del shunned[0]
        finally:
            one.is_submitting = False

    def _watched(self) -> HostWatch:
        return HostWatch(self._nodes, self.changed)

    async def stop(self, id: int, grace: float) -> None:
        one = self._replicas.get(id)
        if one is None:
            return
        one.is_stopping = True
        if one.job_id:
            is_here = one.job is not None and not one.job.is_queued and not one.hosts.lost
            if is_here and grace:
                await self._cluster.terminate(one.job_id, is_one_node=not places(self._file_of(one.mark)))
                await _wait(one.over, grace)
            if not one.over.is_set():
                await self._cluster.cancel(one.job_id)
                # A lost host answers nobody: its job is gone as far as anybody can say.
                await _wait(one.over, grace if one.hosts.lost else _UNTIL_GONE)
            self._cancelled[one.job_id] = _now()
        if self._replicas.get(id) is one:
            self._forget(id)

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id, one) for id, one in self._replicas.items()}

    def _listing(self, id: int, one: _Replica) -> ReplicaListing:
        name = f"{self._folder.name}-{id}"
        job, now = one.job, _now()
        listing = ReplicaListing(
            name, id=id, launched_seconds=max(0.0, now - one.begun), infra=self.name, state=State.PROVISIONING
        )
        if job is None:
            return replace(listing, reason=self._silence)
        listing = replace(listing, infra=f"{self.name} ({job.partition})", node=job.node)
        if job.is_queued:
            is_long = now - one.begun > _QUEUED
            return replace(listing, reason=self._silence or (f"Slurm queues it: {job.reason}" if is_long else ""))
        if job.left is not None:
            listing = replace(listing, ends_in_seconds=max(0.0, job.left - (now - one.seen_at)))
        state, reason = one.words.state()
        if not job.has_several_nodes:  # whose parts say in one log what each of them leased
            listing = replace(listing, resources=one.words.resources or "-", leased=one.words.leased)
        listing = replace(
            listing,
            has_to_move=bool(one.has_to_move),
            reason=one.has_to_move or reason or self._silence,
        )
        if not job.mark.at or one.hosts.lost:
            return replace(listing, state=state if state.is_before_start else State.PROVISIONING)
        with contextlib.suppress(ConfigError):
            return replace(listing, endpoint=job.mark.at, state=state)
        return listing

    def ended(self) -> tuple[Ended, ...]:
        ended, self._ended = self._ended, []
        return tuple(ended)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        for id, one in self._replicas.items():
            job = one.job if not one.is_stopping else None
            if job is None or not job.mark.at or not (id in suspects or job.has_several_nodes):
                one.hosts.is_fine()
            elif one.hosts.may_look:
                one.hosts.look(self._places(one), is_serving=id not in suspects)
        return {id: one.hosts.lost for id, one in self._replicas.items() if one.hosts.lost}

    def _places(self, one: _Replica) -> list[Place]:
        """Where it runs; empty while it does not. All of several nodes are known once they have found each other."""
        if one.job is None or one.job.is_queued:
            return []
        if one.job.has_several_nodes:
            return places(self._file_of(one.mark))
        at = urlsplit(one.job.mark.at)
        return [Place(one.job.node, at.hostname or "", at.port or 0)]

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for one in self._replicas.values():
            one.hosts.close()
        for job in await self._cluster.jobs():
            if job.mark.of == self._of and not job.is_ending:
                await self._cluster.cancel(job.id)
        shutil.rmtree(self._folder.path / "jobs", ignore_errors=True)
        self._front.close()

    async def _watch(self) -> None:
        while True:
            began = _now()
            try:
                await self._look()
            except Silent as failure:
                self._hush(failure)
            except Exception as failure:  # whatever it is, the next look comes
                self._silence = f"looking at Slurm's queue failed: {failure}"
            await asyncio.sleep(max(0.1, _LOOK - (_now() - began)))

    def _hush(self, failure: Silent) -> None:
        if not self._silence:
            self._silence = f"since {time.strftime('%H:%M:%S')} Slurm does not say whether it runs: {failure}"

    async def _look(self) -> None:
        listed = {job.id: job for job in await self._cluster.jobs() if job.mark.of == self._of}
        self._silence = ""
        for id, one in list(self._replicas.items()):
            # Two, if sbatch was killed for its silence and was heard all the same, after the next one.
            same = [job for job in listed.values() if job.mark.start == one.mark.start]
            job = next((job for job in same if job.id == one.job_id), same[0] if same else None)
            if job is not None:
                del listed[job.id]
                one.job, one.job_id, one.seen_at = job, job.id, _now()
                if one.is_stopping and job.is_ending:
                    continue
                if job.is_queued and one.avoids and not one.avoids & set(self._nodes.shunned()):
                    one.avoids = frozenset()
                    await self._cluster.allow(job.id, excluding(one.asked, []))
                self._bound_log(id)
            elif one.is_submitting:
                continue
            elif not one.job_id:
                if not one.is_stopping:
                    try:
                        await self._submit(one)
                    except CannotStart as failure:
                        self._ended.append(Ended(id, str(failure)))
                        self._forget(id)
                        self.changed.set()
            elif (end := await self._cluster.end_of(one.job_id)) is not None:
                self._end(id, one, end)
        for job in listed.values():
            # Of a replica that was given up while Slurm was silent, or whose host was lost and is back.
            if not job.is_ending and _now() - self._cancelled.get(job.id, -math.inf) > _UNTIL_GONE:
                await self._cluster.cancel(job.id)
                self._cancelled[job.id] = _now()
        await self._nodes.look()
        self._note_who_has_to_move()

    def _note_who_has_to_move(self) -> None:
        for one in self._replicas.values():
            one.has_to_move = self._nodes.why_to_move(self._places(one))

    def _end(self, id: int, one: _Replica, end: End) -> None:
        one.over.set()
        if one.is_stopping:
            return
        words = last_words(tail(self._folder.replica_log(id), _TOLD))
        if end.is_blameless:
            is_time_up = end.state == "TIMEOUT"
            limit = f" (its limit is {end.limit})" if is_time_up else ""
            why = f"Slurm ended job {one.job_id}: {end.state}{limit}"
            over = Ended(id, why, is_blameless=True, counts_if_never_ready=is_time_up)
        elif end.state in ("OUT_OF_MEMORY", "DEADLINE"):
            over = Ended(id, f"Slurm ended job {one.job_id}: {end.state}")
        else:
            over = Ended.by(id, end.code, words)
        if over.waits_for_gpu and one.job is not None:
            # Slurm gave it a GPU that a process outside of Slurm has: that is no queue, and another node may do.
            self._nodes.shun({place.node for place in self._places(one)})
            over = replace(over, waits_for_gpu=False)
        self._ended.append(over)
        self._forget(id)
        self.changed.set()

    def _forget(self, id: int) -> None:
        one = self._replicas.pop(id)
        one.hosts.close()
        if one.batch is not None:
            one.batch.remove()
        else:
            remove(self._file_of(one.mark))

    def _file_of(self, mark: Mark) -> Path:
        return self._folder.path / "jobs" / f"{mark.start}.json"

    def _bound_log(self, id: int) -> None:
        """Keeps the log as large as other engines' logs. Slurm's daemon on the node has it open, and goes on."""
        log = self._folder.replica_log(id)
        with contextlib.suppress(OSError):
            if log.stat().st_size > rotation.MAX_BYTES:
                whole = log.with_name(f"{log.name}.whole")
                shutil.copyfile(log, whole)
                os.truncate(log, 0)
                one, two = rotation.newest_first(log)[1:3]
                with contextlib.suppress(FileNotFoundError):
                    one.replace(two)
                whole.replace(one)


def last_words(lines: Sequence[str]) -> str:
    """The last line of a job's log that says why it ended: srun itself tells of the end of all after that of one."""
    own = (line for line in reversed(lines) if line.strip() and not _AFTERWARDS.match(line))
    return next(own, "")


async def _wait(over: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)


def _name_of(folder: ServiceFolder) -> str:
    return f"groundserve-{folder.name}"


def _of(folder: ServiceFolder) -> str:
    """A word for the service's folder, which is on the shared file system and so the same on each host."""
    return hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:8]


def _now() -> float:
    return asyncio.get_running_loop().time()
