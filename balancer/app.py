"""The composition root: builds all parts of one balancer process, starts them, and ends them in the right order."""

import asyncio
import contextlib
import ipaddress
import logging

import httpx

from balancer.admin.connection import AdminConnection
from balancer.admin.feed import Feed
from balancer.admin.guard import Guard
from balancer.admin.playground import playground_router
from balancer.admin.routes import admin_app
from balancer.admin.site import add_page
from balancer.config import Config, Reread
from balancer.errors import ConfigError
from balancer.fleet.dial import Dialer
from balancer.fleet.discovery import DnsDiscovery, Resolve, resolve
from balancer.fleet.fleet import Fleet
from balancer.fleet.lateness import Lateness
from balancer.fleet.prober import Prober
from balancer.observe.access_log import AccessLog
from balancer.observe.history import History
from balancer.observe.metrics import BalancerCollector, metrics_router, registry_of
from balancer.observe.record import Record
from balancer.observe.snapshot import ServiceFacts
from balancer.observe.tally import Tallies
from balancer.relay import asgi, listen
from balancer.relay.auth import Keys
from balancer.relay.cors import Cors
from balancer.relay.doors import Doors
from balancer.relay.file_watch import MOUNT_ITS_FOLDER, FileWatch
from balancer.relay.own_paths import public_app
from balancer.relay.proxy import Proxy
from balancer.relay.reply import Reply
from balancer.relay.request import Network, Request
from balancer.relay.sweep import Job, Sweep
from balancer.relay.tls import Certificate, replica_context
from balancer.relay.upstream import Pool
from balancer.routing.admission import Admission
from balancer.routing.policies import InstanceAwareLeastLoad, LeastLoad, Policy, RoundRobin
from balancer.routing.prefix_aware import PrefixAware
from balancer.spec.loopback import is_loopback_name
from balancer.spec.settings import Settings

log = logging.getLogger("groundserve")

LAST_CALL = 0.1  # seconds from the port's closing to the end of idle connections: requests may be on their way


class Balancer:
    """One balancer in one event loop. `start` opens both ports, `leave` drains, `stop` ends everything.

    `look_up` is how names of replicas are resolved, `reread` what the configuration is by now.
    """

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        log_descriptor: int = 1,
        look_up: Resolve = resolve,
        reread: Reread | None = None,
    ) -> None:
        self.config = config
        self.loop = loop
        self._reread = reread
        self._service_watch = FileWatch(config.service_file) if config.service_file else None
        settings = config.settings
        self.facts = ServiceFacts(config.name)
        self.tallies = Tallies()
        self.fleet = Fleet(settings, config.readiness, loop.time)
        self.lateness = Lateness(loop, self.tallies.loop_lag.note)
        self.dialer = Dialer(look_up, self.lateness.within)
        self.fleet.when_joined.append(self.tallies.member_joined)
        self.fleet.when_left.append(self.tallies.member_left)
        self.admission = Admission(self.fleet, _policy(config))
        self.keys = Keys(config.api_keys) if config.api_keys else None
        self.certificate = Certificate(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
        replica_tls = replica_context(config.replica_ca)
        self.prober = Prober(self.fleet, config.replica_key, replica_tls, dialer=self.dialer)
        self.discovery = DnsDiscovery(config.discover, self.fleet, look_up) if config.discover else None
        if self.discovery is not None:
            self.discovery.when_engine_gone.append(self.facts.forget)
        self.pool = Pool(settings, loop, self.fleet.doubted, replica_tls, self.dialer)
        self.fleet.when_left.append(self.pool.forget)
        self.access_log = AccessLog(log_descriptor, config.is_log_json)
        headers = {"Authorization": f"Bearer {config.replica_key}"} if config.replica_key else {}
        self._client = httpx.AsyncClient(headers=headers, verify=replica_tls, trust_env=False)
        own = public_app(self.fleet, lambda: self.facts.is_leaving, self._client)

        async def answer_own(request: Request, reply: Reply) -> None:
            await asgi.answer(own, request, reply)

        self.proxy = Proxy(
            self.fleet,
            self.admission,
            self.pool,
            _Observer(self.access_log, self.tallies),
            answer_own,
            self._cors(settings),
            config.replica_key.encode() if config.replica_key else None,
            self.keys,
            config.admin_key,
        )
        self.doors = Doors(
            settings,
            loop,
            self.proxy.check,
            self.proxy.serve,
            self.proxy.refuse,
            _networks(settings.trusted_proxies),
        )
        list_replicas = self.discovery.reconcile if self.discovery else self.fleet.reconcile
        admin = admin_app(self.facts, self.fleet, self.admission, list_replicas, lambda: config.admin_key)
        self.figures = BalancerCollector(
            self.fleet,
            self.admission,
            self.tallies,
            self.keys,
            connections=lambda: len(self.doors.connections),
            buffered=lambda: self.doors.buffered,
        )
        admin.include_router(metrics_router(registry_of(self.figures)))
        self.history = History(self.fleet, self.admission, self.tallies)
        self.feed = Feed(self.facts, self.fleet, self.admission, self.tallies, self.history)
        add_page(admin, self.feed)
        self._own_client = httpx.AsyncClient(
            verify=self.certificate.own_context if self.certificate else replica_tls,
            trust_env=False,
            timeout=httpx.Timeout(None, connect=5),
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        admin.include_router(playground_router(lambda: listen.reachable(self.endpoint), self._own_client))
        self._sockets = [listen.listening(*config.listen), listen.listening(*config.admin)]
        guarded = Guard(admin, is_loopback_name(config.admin[0]), config.admin_key is not None)
        self.endpoint = listen.url_of(self._sockets[0], is_tls=self.certificate is not None)  # what a client asks for
        self.admin_endpoint = listen.url_of(self._sockets[1])
        self._admin_server = listen.server(guarded, AdminConnection)
        self._door: listen.Door | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sweep = Sweep(self._jobs())

    async def start(self) -> None:
        """Opens both ports and begins to watch the replicas."""
        self.facts.endpoint = self.endpoint
        self.lateness.start()
        self.fleet.reconcile(self.config.replicas)
        self.prober.start()
        if self.discovery is not None:
            self.discovery.start()
        context = self.certificate.context if self.certificate else None
        self._door = await listen.door(self.doors, self._sockets[0], context)
        self._tasks.append(asyncio.ensure_future(self._admin_server.serve(sockets=[self._sockets[1]])))
        self._tasks.append(asyncio.ensure_future(self._sweep.run()))
        while not self._admin_server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)

    def renew(self, config: Config) -> None:
        """Goes by another policy, other numbers, another readiness probe from now on, while requests go on.

        What a process is started with stays: addresses, the list of replicas, files of keys and certificates.
        Raises ConfigError, and changes nothing, where the new configuration cannot be used.
        """
        before, settings = self.config, self.fleet.settings
        trusted = _networks(config.settings.trusted_proxies)
        settings.renew(config.settings)
        self.fleet.renew(config.readiness)
        self.doors.trust(trusted)
        self.proxy.cors = self._cors(settings)
        if (config.policy, config.target_qps) != (before.policy, before.target_qps):
            self.admission.policy = _policy(config)
        if config.name != before.name:
            self.facts.name = config.name
        if (config.tls_cert, config.tls_key) != (before.tls_cert, before.tls_key):
            log.warning("another certificate file is taken up at the next start only")
        self.config = config

    def _cors(self, settings: Settings) -> Cors:
        return Cors(settings.cors_origins, self.keys is not None, is_loopback_name(self.config.listen[0]))

    async def leave(self, hurry: asyncio.Event) -> None:
        """Drains: not ready any more, port still open; then port closed, answers in flight finish; the rest break.

        `hurry` set ends the waiting at once.
        """
        settings = self.config.settings
        self.facts.is_leaving = self.doors.is_leaving = True
        await _wait(hurry, settings.drain_grace)
        if self._door is not None:
            self._door.close()
        await _wait(hurry, settings.drain_timeout and LAST_CALL)
        self.doors.close()
        deadline = self.loop.time() + settings.drain_timeout
        while self.doors.connections and self.loop.time() < deadline and not hurry.is_set():
            await _wait(hurry, min(0.05, settings.drain_timeout))
        for connection in list(self.doors.connections):
            connection.break_off("the balancer is shutting down.")
        await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Ends every loop and closes every socket."""
        self.feed.close()
        self._admin_server.should_exit = True
        if self._door is not None:
            self._door.close()
        sweep = self._tasks.pop()
        sweep.cancel()
        await asyncio.gather(*self._tasks, sweep, return_exceptions=True)
        if self.discovery is not None:
            await self.discovery.stop()
        await self.prober.stop()
        self.pool.close()
        await self.dialer.close()
        self.lateness.stop()
        await self._client.aclose()
        await self._own_client.aclose()
        self.access_log.flush()

    def _jobs(self) -> dict[str, Job]:
        jobs: dict[str, Job] = {
            "client connections": self.doors.sweep,
            "connections to replicas": self.pool.sweep,
            "waiting requests": lambda _: self.admission.expire(),
            "the access log": lambda _: self.access_log.flush_some(),
            "the counts": lambda _: self.tallies.count_some(),
            "the page's history": self.history.take,
            "the service file": lambda _: self._reload(),
        }
        if (keys := self.keys) is not None:
            jobs["API keys"] = lambda _: self._reload_keys(keys)
        if (certificate := self.certificate) is not None:
            jobs["the certificate"] = lambda _: certificate.reload()
        return jobs

    def _reload_keys(self, keys: Keys) -> None:
        if keys.reload():
            self.tallies.keep_keys({key.name for key in keys})

    def _reload(self) -> None:
        """Takes up a service file that changed; a mistake in it leaves all as it was."""
        if self._service_watch is None or self._reread is None or not self._service_watch.has_changed():
            return
        if self._service_watch.is_cut_off:
            log.warning("%s: %s", self.config.service_file, MOUNT_ITS_FOLDER)
            return
        try:
            self.renew(self._reread())
        except ConfigError as error:
            log.warning("%s; all stays as it was", error)
        else:
            log.info("%s: taken up", self.config.service_file)


class _Observer:
    """Tells of each request what its log line and the figures need."""

    def __init__(self, log: AccessLog, tallies: Tallies) -> None:
        self.gaps = tallies.gaps
        self._log = log
        self._tallies = tallies

    def finished(self, record: Record) -> None:
        self._log.finished(record)
        self._tallies.finished(record)


def _policy(config: Config) -> Policy:
    match config.policy:
        case "round_robin":
            return RoundRobin()
        case "least_load":
            return LeastLoad()
        case "prefix_aware":
            return PrefixAware()
        case "instance_aware_least_load":
            return InstanceAwareLeastLoad(config.target_qps)


def _networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text, strict=False) for text in texts)
    except ValueError as error:
        raise ConfigError(f"trusted_proxies: {error}; write addresses or networks like 10.0.0.0/8") from None


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
