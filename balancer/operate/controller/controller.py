"""Keeps a service in its wanted state: observes, decides with plan.py, acts through an engine, tells the balancer."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from balancer.contract.status import Snapshot
from balancer.contract.words import Phase, ServiceStatus, State
from balancer.errors import ConfigError
from balancer.operate.controller import happened, plan
from balancer.operate.controller.plan import Abandon, Action, Drain, Forget, Replace, Replica, Stage, Start, Stop
from balancer.operate.controller.readiness import Readiness
from balancer.operate.controller.report import Report, silent
from balancer.operate.controller.rollout import Mode
from balancer.operate.controller.traffic import Traffic
from balancer.operate.controller.troubles import Troubles, described
from balancer.operate.controller.wanted import UpdateResult, Wanted
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.engine import Ended, Engine
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.event_log import Event, What

# Seconds between two steps while nothing happens; after a process ends, the next step follows at once.
_PERIOD = 0.5
# Seconds without an answer of the balancer that are worth an event; one that is restarted takes less.
_SILENCE = 5.0
# Seconds after its first answer in which a balancer has found out which of the replicas that were taken over are ready.
_NEWS = 10.0


class Controller:
    """One service. `run` returns after `close` has been called and everything is down.

    The other methods may be called at any time on the same event loop. They record what is wanted; `run` acts on it.
    """

    def __init__(
        self,
        name: str,
        wanted: Wanted,
        engine: Engine,
        balancer: BalancerHandle,
        say: Callable[[str], None],
        show: Callable[[Snapshot], None],
        record: Callable[[Event], None],
        failed_gpus: Callable[[], Awaitable[Mapping[int | None, str]]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say` is called with messages for the user, `show` with snapshots, `record` with what happens.

        `failed_gpus` tells of the GPUs that replicas lease, by index, and under None of all of them.
        """
        self.name = name
        self.wanted = wanted
        self.replicas: dict[int, Replica] = {}
        self._engine = engine
        self._balancer = balancer
        self._wake = engine.changed
        self._say = say
        self._show = show
        self._record = record
        self._clock = clock
        self._report = Report(name, lambda: balancer.endpoint, engine.name)
        self.snapshot = self._report.alone([], self.wanted, 0.0)
        self._traffic = Traffic()
        self._readiness = Readiness(engine.fields)
        self._next_id = 1
        self._balancer_starts = 0
        self._heard_at = clock()  # when the balancer last answered
        self._is_silent = False
        self._condemned: set[int] = set()
        # Replicas that were taken over, and of which no balancer has said yet whether they serve; until when it may.
        self._unheard_of: set[int] = set()
        self._news_until = math.inf
        self._updates: list[asyncio.Future[UpdateResult]] = []
        self._is_closing = False
        self._is_leaving = False
        self._hurry = asyncio.Event()
        self._telling = asyncio.Lock()  # an older list must not arrive after a newer one
        self._renewing = asyncio.Lock()  # nor older settings after newer ones
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._troubles = Troubles(lambda text: say(f"{name}: {text}"), clock)
        self._failed_gpus = failed_gpus
        self._known_failures: Mapping[int | None, str] = {}
        self._looking: set[asyncio.Task[bool]] = set()  # at the GPUs of replicas that ended
        self._served: set[int] = set()  # versions of which a replica has been ready
        self._is_renewal_due = False  # the balancer has older settings than the version that serves
        # Once closed: is nothing of the service left running?
        self.is_cleared = False

    async def run(self) -> None:
        """Returns once closed and everything is down. Raises CannotStart if the balancer cannot run."""
        self._record(Event(What.CONTROLLER_STARTED, f"version {self.wanted.serving.version}"))
        try:
            # Before it is known what runs, nothing may be started or stopped.
            await self._troubles.insist("finding out what runs", self._adopt, lambda: self._is_closing)
            while not self._is_closing:
                self._wake.clear()
                await self._step()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _PERIOD)
        finally:
            await (self._leave() if self._is_leaving else self._end())

    def leave(self) -> None:
        """Ends the controller alone: all goes on, and the next one takes it up."""
        self._is_leaving = self._is_closing = True
        self._wake.set()

    def close(self) -> None:
        """Ends the service once the answers in flight are finished; a second call ends it at once."""
        if self._is_closing:
            self._hurry.set()
        self._is_closing = True
        self._wake.set()

    def scale(self, target: int) -> None:
        """Sets the wanted number of replicas, and retries those that were given up. Raises ConfigError."""
        self._refuse_at_the_end()
        if target > (most := self._engine.most_replicas):
            raise ConfigError(
                f"{self.name} with {target} replicas: with --on {self._engine.name} it can have {most} at most"
            )
        before = self.wanted.target
        self.wanted.scale(target)
        self._record(Event(What.SCALED, f"{before} to {target}: it was asked for"))
        for replica in self.replicas.values():
            if replica.stage is Stage.GIVEN_UP:
                self._keep(replace(replica, stage=Stage.WAITING, failures=0, start_at=0.0))
        self._wake.set()

    def replace_replica(self, id: int) -> None:
        """Drains and stops a replica; another takes its place. Raises ConfigError if there is no such replica."""
        self._refuse_at_the_end()
        if id not in self.replicas or not self.replicas[id].is_wanted:
            known = ", ".join(str(replica.id) for replica in self.replicas.values() if replica.is_wanted)
            raise ConfigError(f"{self.name} has no replica {id}; it has {known or 'none'}")
        self._condemned.add(id)
        self._wake.set()

    async def replace_balancer(self) -> None:
        """Replaces the balancer's process; the old one finishes its answers. Raises ConfigError."""
        self._refuse_at_the_end()
        await self._balancer.replace()

    async def update(self, recipe: Recipe, mode: Mode, is_restart: bool = False) -> UpdateResult:
        """Makes this version the wanted one. Returns once all replicas run it, or it failed and the old one is back.

        It supersedes an update under way. With `is_restart` replicas are replaced even if nothing about them changes.
        Raises ConfigError if it cannot be rolled out in this mode.
        """
        self._refuse_at_the_end()
        coming, serving = self.wanted.coming, self.wanted.serving
        numbers = self.wanted.target, self.wanted.before
        same = self.wanted.update(recipe, mode, is_restart)
        self._renumber(same, recipe.version)
        if coming is not None:
            self._record(Event(What.UPDATE_FAILED, f"version {coming.version}: version {recipe.version} superseded it"))
            self._resolve(UpdateResult(coming.version, superseded_by=recipe.version))
        if self.wanted.coming is None:
            # The replicas' processes stay; only the balancer's settings change.
            try:
                await self._renew_balancer(recipe)
            except Exception as failure:
                # The balancer may have a part of it; and what a later update has made of it in the meantime stays.
                self._is_renewal_due = True
                if self.wanted.serving is recipe and self.wanted.coming is None:
                    self.wanted.update(serving, "rolling")
                    self.wanted.target, self.wanted.before = numbers
                    self._renumber(recipe.version, serving.version)
                why = described(failure)
                self._record(Event(What.UPDATE_FAILED, f"version {recipe.version}: {why}"))
                raise ConfigError(f"{self.name} stays at version {serving.version}: {why}") from None
            self._record(Event(What.UPDATED, f"to version {recipe.version}, without a restart"))
            if not self._is_closing:
                await self._tell()  # a status request after this must not show the old version
            self._wake.set()
            return UpdateResult(recipe.version)
        self._record(Event(What.UPDATE_STARTED, f"version {self.wanted.serving.version} to {recipe.version}, {mode}"))
        result: asyncio.Future[UpdateResult] = asyncio.get_running_loop().create_future()
        self._updates.append(result)
        self._wake.set()
        return await result

    def abort(self) -> UpdateResult:
        """Ends the update under way, and brings the version that serves back. Raises ConfigError if there is none."""
        self._refuse_at_the_end()
        result = self.wanted.abort()
        self._record(Event(What.UPDATE_ABORTED, f"version {result.version}"))
        self._resolve(result)
        self._wake.set()
        return result

    def _refuse_at_the_end(self) -> None:
        """Nobody would act on what is asked for now, nor tell whoever waits for it. Raises ConfigError."""
        if self._is_closing:
            how = "about to get another controller" if self._is_leaving else "being taken down"
            raise ConfigError(f"{self.name} is {how}")

    def _renumber(self, old: int | None, new: int) -> None:
        for replica in list(self.replicas.values()):
            if replica.version == old:
                self._keep(replace(replica, version=new))

    async def _adopt(self) -> None:
        """Takes over the replicas that an earlier controller left running."""
        survivors = await self._engine.found()
        if not survivors:
            return
        versions = self.wanted.adopt(survivors)
        now = self._clock()
        for survivor in survivors:
            ran = survivor.listing.launched_seconds or 0.0
            version = versions[survivor.id]
            # Before the switch all replicas of the new version were proven.
            is_proven = self.wanted.is_switched and version == self.wanted.newest.version
            replica = Replica(survivor.id, version, Stage.RUNNING, now - ran, was_ready=True, is_proven=is_proven)
            operation = self.wanted.recipes[version].spec.operation
            self._keep(plan.limited(replica, ran, survivor.listing.ends_in_seconds, now, operation))
            self._unheard_of.add(survivor.id)
        self._next_id = max(survivor.id for survivor in survivors) + 1
        self._say(f"{self.name}: found {len(survivors)} of its replicas running")

    async def _step(self) -> None:
        """What fails is tried again in a later step, while the rest goes on. Raises if the balancer never can start."""
        if self._balancer.has_answered:
            await self._troubles.attempt("keeping its balancer up", self._balancer.keep_up)
        else:
            await self._balancer.keep_up()
        self._note_balancer()
        if self._is_renewal_due:
            await self._troubles.attempt("renewing the balancer's settings", self._catch_up)
        await self._troubles.attempt("looking after the replicas", self._look_after_replicas)

    async def _catch_up(self) -> None:
        serving = self.wanted.serving
        await self._renew_balancer(serving)
        self._is_renewal_due = self.wanted.serving is not serving

    async def _look_after_replicas(self) -> None:
        for over in self._engine.ended():
            self._lost(over)
        await self._tell()
        await self._probe_hidden()
        now = self._clock()
        self._note_places(now)
        lost = self._engine.lost([r.id for r in self.replicas.values() if r.stage is Stage.RUNNING and not r.is_ready])
        before, load, was_switched = self.wanted.target, self._traffic.take(), self.wanted.is_switched
        counts, result = self.wanted.counts(self.replicas.values(), load, now)
        if self.wanted.is_switched and not was_switched:
            self._show(self.snapshot)  # so that it is written down before a balancer hears of it
        if load is not None and self.wanted.target != before:
            why = f"{load.in_flight} requests at replicas, {load.queued} waiting"
            self._record(Event(What.SCALED, f"{before} to {self.wanted.target}: {why}"))
        if result is not None:
            await self._updated(result)
        timeout = self.wanted.serving.spec.settings.drain_timeout
        actions = plan.decide(self.replicas.values(), counts, self._next_id, now, timeout, self._condemned, lost)
        if self._unheard_of:
            # What serves and what drains is unknown: the one that looks superfluous may be all that serves.
            actions = [action for action in actions if isinstance(action, Start | Forget | Abandon)]
        else:
            self._condemned.clear()
        # A new balancer process knows nothing of earlier drains, so they are repeated.
        for replica in self.replicas.values():
            is_forgotten = replica.status is not None and replica.status.phase is not Phase.LEAVING
            if replica.stage is Stage.DRAINING and is_forgotten:
                await self._balancer.drain(replica.id)
        if self._balancer.is_leaving:
            actions = [action for action in actions if not isinstance(action, Stop)]
        if actions:
            acted = await asyncio.gather(*(self._act(action) for action in actions), return_exceptions=True)
            await self._tell()
            for failure in filter(None, acted):
                raise failure

    async def _act(self, action: Action) -> None:
        match action:
            case Start(id, version):
                self._start(id, version)
            case Drain(id) if self.replicas[id].stage is Stage.RUNNING:
                drained = plan.drained(self.replicas[id], self._clock())
                if drained.version in self.wanted.hidden:
                    self._keep(replace(drained, status=None))  # the balancer never knew it
                else:
                    self._keep(drained)
                    await self._balancer.drain(id)
            case Drain(id):
                # It is already being stopped for a restart, which is now cancelled.
                self._keep(replace(self.replicas[id], stage=Stage.STOPPING))
            case Forget(id):
                self._forget(id)
            case Stop(id):
                self._keep(replace(self.replicas[id], stage=Stage.STOPPING))
                self._stop(id, None)
            case Replace(id, reason):
                self._keep(replace(self.replicas[id], stage=Stage.REPLACING, reason=reason))
                self._stop(id, reason)
            case Abandon(id, reason):
                self._say(f"{self.name}-{id} is lost, another takes its place: {reason}")
                self._record(Event(What.LOST, reason, id))
                self._keep(replace(self.replicas[id], stage=Stage.STOPPING, reason=reason))
                self._stop(id, None)

    def _note_places(self, now: float) -> None:
        """Remembers which replicas wait in the engine's queue, and which have to go because the engine wants it."""
        for id, listing in self._engine.running().items():
            replica = self.replicas.get(id)
            if replica is None or replica.stage not in (Stage.RUNNING, Stage.DRAINING):
                continue
            operation = self.wanted.recipes[replica.version].spec.operation
            is_queued = listing.state is State.PROVISIONING and not listing.endpoint and bool(listing.reason)
            changed = plan.ending(replace(replica, is_queued=is_queued), listing.ends_in_seconds, now, operation)
            is_told = listing.state is State.SHUTTING_DOWN and listing.ends_in_seconds is not None
            if listing.has_to_move or is_told:
                changed = plan.moving(changed)
            if changed.is_outgoing and not replica.is_outgoing:
                why = listing.reason if listing.has_to_move else f"it ends in {listing.ends_in_seconds:.0f} s"
                self._say(f"{self.name}-{id}: {why}: a successor starts")
                self._record(Event(What.OUTGOING, f"{why}: a successor starts", id))
            if is_queued and not replica.is_queued:
                self._record(Event(What.WAITS_FOR_GPU, listing.reason, id))
            if changed != replica:
                self._keep(changed)

    def _start(self, id: int, version: int) -> None:
        """Starts a replica without waiting for it: meanwhile the balancer has to hear of the others."""
        if id not in self.replicas:
            self._next_id = max(self._next_id, id + 1)
            self._keep(Replica(id, version))
        self._keep(plan.started(self.replicas[id], self._clock()))
        recipe = self.wanted.recipes[version]

        async def start() -> None:
            try:
                await self._engine.start(id, recipe)
            except Exception as failure:  # whatever it is, this replica does not run, and the others are to
                self._lost(Ended(id, described(failure)))
            self._wake.set()

        task = self._starting[id] = asyncio.create_task(start())
        task.add_done_callback(lambda _: self._starting.pop(id, None))

    def _stop(self, id: int, reason: str | None) -> None:
        """Stops a replica's process without waiting for its end. With a `reason` the replica then starts again."""

        async def stop() -> None:
            if id in self._starting:
                await asyncio.wait({self._starting[id]})
            grace = self.wanted.serving.spec.operation.stop_grace
            # It holds its GPU until it is gone, so another may not take its place before.
            await self._troubles.insist(
                f"stopping {self.name}-{id}", lambda: self._engine.stop(id, grace), lambda: self._is_closing
            )
            if reason is None:
                self._forget(id)
            else:
                self._lost(Ended(id, reason))
            self._wake.set()

        task = asyncio.create_task(stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    def _lost(self, over: Ended) -> None:
        id = over.id
        replica = self.replicas.get(id)
        if replica is None:
            return
        if not replica.is_wanted:
            self._forget(id)
            return
        now = self._clock()
        operation = self.wanted.recipes[replica.version].spec.operation
        changed = plan.ended(replica, over, now, operation, has_served=self._has_served(replica.version))
        self._keep(changed)
        if changed.reason and not changed.waits_for_gpu and not over.is_blameless:
            self._look_at_gpus(id)
        if changed.stage is Stage.GIVEN_UP:
            self._say(f"{self.name}-{id} is given up: {over.reason}")
        elif not changed.waits_for_gpu:
            self._say(f"{self.name}-{id} ended, starts again in {changed.start_at - now:.3g} s: {over.reason}")
        elif not replica.waits_for_gpu:
            self._say(f"{self.name}-{id} waits for a GPU: {over.reason}")

    def _look_at_gpus(self, id: int) -> None:
        """Records what the driver says of failed GPUs; a replica that ended by itself may have had one of them."""
        leased, failed_gpus = self._report.leased(id), self._failed_gpus
        if not leased or failed_gpus is None:
            return

        async def look() -> None:
            failed = await failed_gpus()
            for index, problem in failed.items():
                if self._known_failures.get(index) == problem:
                    continue
                is_its = index is None or f"GPU {index} (" in leased
                named = problem if index is None else f"GPU {index}: {problem}"
                self._say(f"{self.name}: {named}")
                self._record(Event(What.GPU_FAILED, named, id if is_its else None))
            self._known_failures = failed

        task = asyncio.create_task(self._troubles.attempt("looking at the GPUs", look))
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    def _has_served(self, version: int) -> bool:
        """Has it been ready before, and is it no longer being tried out? Then what fails now lies outside of it."""
        coming = self.wanted.coming
        return version in self._served and (coming is None or coming.version != version)

    async def _updated(self, result: UpdateResult) -> None:
        if result.failure:
            self._say(f"{self.name} stays at version {self.wanted.serving.version}: {result.failure}")
            self._record(Event(What.UPDATE_FAILED, f"version {result.version}: {result.failure}"))
        else:
            self._say(f"{self.name} is at version {result.version}")
            self._record(Event(What.UPDATED, f"to version {result.version}"))
            self._is_renewal_due = True
            await self._troubles.attempt("renewing the balancer's settings", self._catch_up)
        self._resolve(result)

    def _resolve(self, result: UpdateResult) -> None:
        """Tells those who wait for the end of the update."""
        for waiting in self._updates:
            if not waiting.done():
                waiting.set_result(result)
        self._updates.clear()

    async def _probe_hidden(self) -> None:
        """Probes the replicas that the balancer must not know about yet."""
        coming = self.wanted.coming
        if coming is None or coming.version not in self.wanted.hidden:
            return
        running = self._engine.running()
        probe = coming.readiness_probe
        asked = [r for r in self.replicas.values() if r.version == coming.version and r.stage is Stage.RUNNING]
        answers = await asyncio.gather(
            *(
                self._readiness.ask(running[replica.id].endpoint if replica.id in running else None, probe)
                for replica in asked
            )
        )
        patience, operation = probe.initial_delay_seconds, coming.spec.operation
        for replica, is_ready in zip(asked, answers, strict=True):
            listing = running.get(replica.id)
            is_before_start = listing is not None and listing.state.is_before_start
            self._keep(plan.probed(replica, is_ready, is_before_start, self._clock(), patience, operation))

    async def _renew_balancer(self, recipe: Recipe) -> None:
        async with self._renewing:
            await self._balancer.renew(recipe)
        # A certificate makes the endpoint https, and the process with the certificate may need a moment to start.
        service = replace(self.snapshot.service, endpoint=self._balancer.endpoint)
        self.snapshot = replace(self.snapshot, service=service)

    async def _tell(self) -> None:
        """Sends the list to the balancer, and updates each replica from its answer."""
        async with self._telling:
            if self._is_closing:
                status, reason = ServiceStatus.SHUTTING_DOWN, ""
            elif plan.is_hopeless(self.replicas.values(), self.wanted.target):
                status, reason = ServiceStatus.FAILED, next((r.reason for r in self.replicas.values() if r.reason), "")
            else:
                status, reason = None, self._troubles.reason
            now = self._clock()
            running = self._engine.running()
            self._report.note(running, self.replicas.keys())
            snapshot = await self._balancer.tell(
                self._report.listing(self.replicas.values(), self.wanted, now, status, reason)
            )
            if snapshot is None:
                if not self._balancer.has_answered:
                    self.snapshot = self._report.alone(self.replicas.values(), self.wanted, now)
                    self._show(self.snapshot)
                elif (silence := self._clock() - self._heard_at) > _SILENCE:
                    self.snapshot = silent(self.snapshot, running, silence, reason)
                    self._show(self.snapshot)
                return
            self._heard_at = now
            self._traffic.note(snapshot, now)
            for row in snapshot.replicas:
                replica = self.replicas.get(row.id)
                if replica is not None and replica.stage in (Stage.RUNNING, Stage.DRAINING):
                    operation = self.wanted.recipes[replica.version].spec.operation
                    self._keep(plan.observed(replica, row.status, row.in_flight, now, operation), row.reason)
            self._note_what_serves(now)
            self.snapshot = self._report.shown(snapshot, self.replicas.values(), self.wanted, now)
            self._show(self.snapshot)

    def _note_what_serves(self, now: float) -> None:
        """Looks at what was taken over, until the balancers have said of each replica what it is."""
        self._news_until = min(self._news_until, now + _NEWS)
        for id in sorted(self._unheard_of):
            replica = self.replicas.get(id)
            if replica is not None and replica.is_leaving:
                self._condemned.add(id)  # the earlier controller drained it to stop it, and nobody else would
            # A balancer that has just started has not asked it yet, and it may have been told to end.
            is_unknown = replica is not None and (replica.status is None or replica.status.phase is Phase.PENDING)
            if not is_unknown or now > self._news_until:
                self._unheard_of.discard(id)

    async def _end(self) -> None:
        """Stops the balancer first, so that no answer is cut off, then the replicas, which are idle by then."""
        self._is_closing = True
        self._resolve(UpdateResult(0, "it was taken down"))
        await self._troubles.attempt("telling the balancer", self._tell)
        await self._troubles.attempt("stopping the balancer", lambda: self._balancer.stop(self._hurry))
        await self._readiness.close()
        for looking in self._looking:
            looking.cancel()
        await asyncio.gather(*self._starting.values(), *self._looking, return_exceptions=True)
        await self._stop_all()
        await asyncio.gather(*self._stopping)
        self.is_cleared = await self._troubles.attempt("removing what is left", self._engine.close)
        if not self.is_cleared:
            self._say(f"{self.name} may have left something running: groundserve down {self.name} removes it")
        self._record(Event(What.CONTROLLER_ENDED))

    async def _leave(self) -> None:
        self._resolve(UpdateResult(0, "its controller ended"))
        for task in (*self._starting.values(), *self._stopping):
            task.cancel()
        await asyncio.gather(*self._starting.values(), *self._stopping, return_exceptions=True)
        await self._readiness.close()
        self._record(Event(What.CONTROLLER_ENDED))

    async def _stop_all(self) -> None:
        ids = list(self._engine.running())

        async def stop_all(grace: float) -> None:
            await asyncio.gather(*(self._engine.stop(id, grace) for id in ids))

        async def hurry() -> None:
            await self._hurry.wait()
            await stop_all(0.0)

        hurrying = asyncio.create_task(hurry())
        grace = self.wanted.serving.spec.operation.stop_grace
        await self._troubles.attempt("stopping the replicas", lambda: stop_all(grace))
        hurrying.cancel()
        await asyncio.gather(hurrying, return_exceptions=True)

    def _note_balancer(self) -> None:
        """Records that the balancer was started, and when it falls silent and is heard again."""
        if self._balancer.starts > self._balancer_starts:
            what = What.BALANCER_RESTARTED if self._balancer_starts else What.BALANCER_STARTED
            self._record(Event(what, f"at {self._balancer.endpoint}"))
            self._balancer_starts = self._balancer.starts
        silence = self._clock() - self._heard_at
        if self._balancer.has_answered and self._is_silent != (silence > _SILENCE):
            self._is_silent = not self._is_silent
            if self._is_silent:
                self._record(Event(What.BALANCER_SILENT, f"for {silence:.0f} s"))
            else:
                self._record(Event(What.BALANCER_BACK))

    def _keep(self, replica: Replica, why: str = "") -> None:
        """Remembers the replica, and records what has happened to it; `why` is what the balancer says of its status."""
        if event := happened.between(self.replicas.get(replica.id), replica, self._clock(), why):
            self._record(event)
        self.replicas[replica.id] = replica
        if replica.was_ready:
            self._served.add(replica.version)

    def _forget(self, id: int) -> None:
        if event := happened.between(self.replicas.pop(id, None), None, self._clock()):
            self._record(event)
