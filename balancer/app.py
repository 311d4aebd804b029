"""The composition root: builds all parts of one balancer process, starts them, and stops them in the right order."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import socket
import ssl
from collections.abc import Sequence

import httpx

from balancer.accounts.accounts import Accounts
from balancer.accounts.store import IssuedKey, Store
from balancer.admin.connection import AdminConnection
from balancer.admin.guard import Guard
from balancer.admin.playground import playground_router
from balancer.admin.routes import admin_app
from balancer.admin.site import add_page
from balancer.config import Config, Reread
from balancer.errors import ConfigError
from balancer.fleet.dial import Dialer
from balancer.fleet.discovery import Resolve, resolve
from balancer.fleet.lateness import Lateness
from balancer.observe.access_log import AccessLog
from balancer.observe.metrics import Clients, Figures, metrics_router
from balancer.observe.observer import Observer
from balancer.observe.tally import Tallies
from balancer.observe.tracing import Tracing
from balancer.relay import asgi, listen
from balancer.relay.auth import Keys
from balancer.relay.cors import Cors
from balancer.relay.directory import Directory
from balancer.relay.doors import Doors
from balancer.relay.file_watch import MOUNT_ITS_FOLDER, FileWatch
from balancer.relay.kept_responses import Noted
from balancer.relay.metering import Meter
from balancer.relay.own_paths import public_app
from balancer.relay.proxy import Proxy
from balancer.relay.request import Network
from balancer.relay.sweep import Job, Sweep
from balancer.relay.tls import Certificate, replica_context
from balancer.services import Services
from balancer.spec.loopback import is_loopback_name
from balancer.spec.settings import Settings

log = logging.getLogger("groundserve")

LAST_CALL = 0.1  # seconds between closing the port and closing idle connections: requests may be on their way
# The same if another process accepts on the port. Clients then do not notice that this one is leaving, so it waits
# longer, in order not to lose a request because it was slow to read it.
LAST_CALL_OF_SHARED = 1.0


class Balancer:
    """One balancer in one event loop. `start` opens both ports, `leave` drains, `stop` ends everything.

    `look_up` resolves the names of replicas; `reread` returns the configuration as it is now.
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
        self.accounts = Accounts(Store(config.state)) if config.state else None
        self.keys = self._all_keys()
        self.certificate = Certificate(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
        replica_tls = replica_context(config.replica_ca)

        # The services, and the counts of what happens there
        self.tallies = Tallies()
        self.tracing = Tracing(config.otlp, config.name) if config.otlp else None
        if self.tracing is not None:
            self.tallies.when_counted.append(self.tracing.finished)
        self.lateness = Lateness(loop, self.tallies.loop_lag.note)
        self.dialer = Dialer(look_up, self.lateness.within)
        noted = Noted(self.accounts.ledger) if self.accounts is not None else None
        self.services = Services(config, loop, self.dialer, replica_tls, look_up, self.tallies, noted)
        self.service = service = self.services.first
        self.access_log = AccessLog(log_descriptor, config.is_log_json)

        # The relay, from its clients to the replicas
        self._client = _client_of_replicas(replica_tls)
        self.destination = self.services.destinations[0]
        self.meter = self._meter()
        self.own_app = public_app(self.services.all, self._client)
        self.proxy = Proxy(
            Directory(self.services.destinations, self.accounts.keeper if self.accounts is not None else None),
            loop,
            Observer(self.access_log, self.tallies),
            functools.partial(asgi.answer, self.own_app),
            cors_of(config, self.keys),
            self.keys,
            config.admin_key,
            self.meter,
            is_traced=self.tracing is not None,
        )
        trusted = networks(service.settings.trusted_proxies)
        self.doors = Doors(service.settings, loop, self.proxy, service.facts, trusted)

        # The ports
        self._sockets = [
            _socket(config.listen, config.listen_fd, "--listen-fd"),
            _socket(config.admin, config.admin_fd, "--admin-fd"),
        ]
        self.endpoint = listen.url_of(self._sockets[0], is_tls=self.certificate is not None)  # the URL for clients
        self.admin_endpoint = listen.url_of(self._sockets[1])
        self._own_client = _client_of(self.certificate.own_context if self.certificate else replica_tls)
        self.figures = Figures(self.services.all, self.tallies, self.keys, self._clients())
        self._admin_server = listen.server(self._admin_app(), AdminConnection)
        self._listener: listen.Listener | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.services.jobs |= self._jobs()
        self._sweep = Sweep(self.services.jobs)

    def _all_keys(self) -> Keys | None:
        """The keys of the file and those that are issued here; None if neither can let anybody in."""
        config, accounts = self.config, self.accounts
        if accounts is None:
            return Keys(config.api_keys) if config.api_keys else None
        keys = Keys(config.api_keys, config.wants_keys or config.api_keys is not None or accounts.has_keys)
        keys.take_up(accounts.issued, self.loop.time(), accounts.used_today)

        def changed(issued: Sequence[IssuedKey]) -> None:
            keys.take_up(issued, self.loop.time(), accounts.used_today)
            self.tallies.keep_keys({key.name for key in keys})
            self.proxy.cors = cors_of(self.config, keys)

        accounts.when_changed.append(changed)
        if keys.are_wanted and not any(keys):
            log.info("nobody is let in yet: give out a key by `groundserve keys add NAME`")
        return keys

    def _meter(self) -> Meter:
        ledger = self.accounts.ledger if self.accounts is not None else None
        meter = Meter(self.loop.time, self.keys, ledger)
        if self.accounts is not None:
            self.tallies.when_counted.append(meter.finished)
            self.accounts.before_reading.append(self.tallies.count)
        return meter

    def _clients(self) -> Clients:
        """Whose connections the metrics count."""
        return self.doors

    def _admin_app(self) -> Guard:
        config = self.config
        app = admin_app(self.services.all, config.admin_key, self.services, self.accounts, self._client)
        app.include_router(metrics_router(self.figures))
        add_page(app, self.services.feeds)
        app.include_router(playground_router(listen.reachable(self.endpoint), self._own_client))
        is_loopback, has_key = is_loopback_name(config.admin[0]), config.admin_key is not None
        return Guard(app, is_loopback, has_key, config.is_admin_for_this_machine, self._may_play)

    def _may_play(self) -> bool:
        """May whoever reaches the admin port generate? The playground asks the endpoint from this machine."""
        config, keys = self.config, self.keys
        others_may_generate = not config.is_for_this_machine or (keys is not None and keys.are_wanted)
        return others_may_generate or config.is_admin_for_this_machine

    async def start(self, leaving: asyncio.Event | None = None) -> None:
        """Opens both ports and begins to watch the replicas.

        With `accept_when_ready`, clients are accepted only when a replica is ready, the time is over, or `leaving` is
        set.
        """
        self.lateness.start()
        self.services.start(self.endpoint)
        self._tasks.append(asyncio.ensure_future(self._admin_server.serve(sockets=[self._sockets[1]])))
        self._tasks.append(asyncio.ensure_future(self._sweep.run()))
        while not self._admin_server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        await self._open_doors(leaving or asyncio.Event())

    async def _open_doors(self, leaving: asyncio.Event) -> None:
        await self._until_ready(leaving)
        context = self.certificate.context if self.certificate else None
        self._listener = await listen.accept(self.doors, self._sockets[0], context)

    async def _until_ready(self, leaving: asyncio.Event) -> None:
        deadline = self.loop.time() + self.config.accept_when_ready
        while self.loop.time() < deadline and not leaving.is_set():
            if any(service.fleet.serving() for service in self.services.all):
                return
            await wait_for(leaving, 0.02)

    def release_ports(self) -> None:
        """Stops accepting on both ports: another process, which shares our sockets, takes over."""
        if self._listener is not None:
            self._listener.close()
        for server in self._admin_server.servers:
            server.close()
        for connection in list(self._admin_server.server_state.connections):
            connection.shutdown()  # takes effect after the current answer

    def renew(self, config: Config) -> None:
        """Applies a new policy, new settings and a new readiness probe while requests continue.

        Addresses, the list of replicas, and the files of keys and certificates stay as they were at the start. Raises
        ConfigError, and changes nothing, if the new configuration cannot be used.
        """
        trusted = networks(config.settings.trusted_proxies)
        before, self.config = self.config, config
        self.services.renew(config)
        self.doors.trust(trusted)
        self.proxy.cors = cors_of(config, self.keys)
        if (config.tls_cert, config.tls_key) != (before.tls_cert, before.tls_key):
            log.warning("another certificate file is taken up at the next start only")

    async def leave(self, hurry: asyncio.Event) -> None:
        """Drains in three steps: reports not ready with the port still open (`drain_grace`); closes the port and lets
        answers in flight finish (`drain_timeout`); breaks off the rest.

        Setting `hurry` ends the waiting at once.
        """
        settings = self.service.settings
        self.services.leave()
        last_call = LAST_CALL if self.config.listen_fd is None else LAST_CALL_OF_SHARED
        await close_doors(self.doors, self._listener, settings, last_call, hurry)

    async def stop(self) -> None:
        """Ends every loop and closes every socket."""
        for feed in self.services.feeds:
            feed.close()
        self._admin_server.should_exit = True
        if self._listener is not None:
            self._listener.close()
        sweep = self._tasks.pop()
        sweep.cancel()
        await asyncio.gather(*self._tasks, sweep, return_exceptions=True)
        await self.services.stop()
        await self.dialer.close()
        self.lateness.stop()
        await self._client.aclose()
        await self._own_client.aclose()
        if self.accounts is not None:
            await self.accounts.close()
        if self.tracing is not None:
            self.tallies.count()
            await asyncio.to_thread(self.tracing.close)
        self.access_log.flush()

    def _jobs(self) -> dict[str, Job]:
        jobs: dict[str, Job] = {
            "client connections": self.doors.sweep,
            "the access log": lambda _: self.access_log.flush_some(),
            "the counts": lambda _: self.tallies.count_some(),
            "the service file": lambda _: self._reload(),
        }
        if (accounts := self.accounts) is not None:
            jobs["usage"] = accounts.ledger.flush
        if (keys := self.keys) is not None:
            jobs["API keys"] = lambda _: self._reload_keys(keys)
            jobs["our part of the limits of keys"] = lambda _: keys.take_share(self.services.share)
        if (certificate := self.certificate) is not None:
            jobs["the certificate"] = lambda _: certificate.reload()
        return jobs

    def _reload_keys(self, keys: Keys) -> None:
        if keys.reload():
            self.tallies.keep_keys({key.name for key in keys})

    def _reload(self) -> None:
        """Applies a changed service file; if it has a mistake, nothing changes."""
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


async def close_doors(
    doors: Doors, listener: listen.Listener | None, settings: Settings, last_call: float, hurry: asyncio.Event
) -> None:
    """The three steps of `Balancer.leave`, from the moment that it reports not ready."""
    await wait_for(hurry, settings.drain_grace)
    if listener is not None:
        listener.close()
    await wait_for(hurry, settings.drain_timeout and last_call)
    doors.close()
    deadline = doors.loop.time() + settings.drain_timeout
    while doors.connections and doors.loop.time() < deadline and not hurry.is_set():
        await wait_for(hurry, min(0.05, settings.drain_timeout))
    for connection in list(doors.connections):
        connection.break_off("the balancer is shutting down.")
    await asyncio.sleep(0.05)


def _socket(address: tuple[str, int], descriptor: int | None, flag: str) -> socket.socket:
    return listen.listening(*address) if descriptor is None else listen.handed_over(descriptor, flag)


def _client_of_replicas(tls: ssl.SSLContext) -> httpx.AsyncClient:
    """A client for the requests to replicas that the balancer's own paths need."""
    return httpx.AsyncClient(verify=tls, trust_env=False)


def _client_of(tls: ssl.SSLContext) -> httpx.AsyncClient:
    """A client for the playground's requests to this balancer's own endpoint: answers may take any time."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(verify=tls, trust_env=False, timeout=httpx.Timeout(None, connect=5), limits=limits)


def cors_of(config: Config, keys: Keys | None) -> Cors:
    """Which web pages may use the endpoint."""
    has_keys = keys is not None and keys.are_wanted
    return Cors(config.settings.cors_origins, has_keys, config.is_for_this_machine)


def networks(texts: tuple[str, ...]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text, strict=False) for text in texts)
    except ValueError as error:
        raise ConfigError(f"trusted_proxies: {error}; write addresses or networks like 10.0.0.0/8") from None


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
