"""The connections to a service's replicas: which are idle, which are busy, and which have been silent for too long."""

import asyncio
import functools
import ssl

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.dial import Dialer
from balancer.fleet.outcome import Outcome
from balancer.relay.places import Place
from balancer.relay.upstream import ReplicaConnection
from balancer.relay.vanished import NEAR_SILENCE
from balancer.spec.settings import Settings


class ConnectionPool:
    """Idle connections are used newest first and closed before SGLang would close them.

    `tls` is for https replicas, `dialer` opens all connections.
    """

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        tls: ssl.SSLContext | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.busy: set[ReplicaConnection] = set()
        self._tls = tls
        self._dialer = dialer or Dialer()
        self._idle: dict[ReplicaAddress, list[ReplicaConnection]] = {}

    def idle_connection(self, replica: ReplicaAddress) -> ReplicaConnection | None:
        """An open idle connection, or None."""
        idle = self._idle.get(replica)
        oldest = self.loop.time() - self.settings.upstream_keep_alive
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.is_open():
                return connection
            connection.close()
        return None

    async def connect(self, replica: ReplicaAddress) -> ReplicaConnection:
        """Opens a new connection.

        Raises OSError when refused, TimeoutError after connect_timeout, Unresolved when no address is known.
        """
        addresses = await self._dialer.addresses(replica)
        tls = (self._tls or ssl.create_default_context()) if replica.is_https else None
        make = functools.partial(ReplicaConnection, self, replica)
        began_at = self.loop.time()
        connection = await self._dialer.connect(replica, addresses, make, tls, self.settings.connect_timeout)
        connection.connected_in = self.loop.time() - began_at
        return connection

    def keep(self, connection: ReplicaConnection) -> None:
        """Keeps a connection that has become idle."""
        connection.idle_since = self.loop.time()
        self._idle.setdefault(connection.replica, []).append(connection)

    def forget(self, replica: ReplicaAddress) -> None:
        """The replica left: closes its idle connections. Busy ones finish their exchange."""
        for connection in self._idle.pop(replica, ()):
            connection.close()

    def sweep(self, now: float) -> None:
        """Ends what has waited too long; call it a few times a second. `now` is the loop's time in seconds."""
        settings = self.settings
        for replica, idle in list(self._idle.items()):
            while idle and (now - idle[0].idle_since > settings.upstream_keep_alive or not idle[0].is_open()):
                idle.pop(0).close()
            if not idle:
                del self._idle[replica]
        for connection in list(self.busy):
            connection.tell_when_heard()
            if connection.is_paused:
                continue  # the client is slow, not the replica
            if (place := connection.place) is None:
                continue
            away = place.away(now)
            if connection.heard_at != connection.last_byte_at:
                connection.heard_at, connection.heard_away = connection.last_byte_at, away
            if (away_for := place.away_for(now)) > 0:
                # Others have its GPU, and its clocks stand still.
                if away_for > settings.start_wait:
                    connection.finish(Outcome.AWAY)
                continue
            # A head proves little: SGLang sends that of /generate before it looks at the prompt.
            waited = now - connection.sent_at - (away - connection.sent_away)
            if not connection.has_begun and waited > settings.first_byte_timeout:
                connection.finish(Outcome.SILENT)
            else:
                self._judge_silence(connection, place, now, away)

    def _judge_silence(self, connection: ReplicaConnection, place: Place, now: float, away: float) -> None:
        """Ends an answer that is silent while its replica shows no sign of life, or that is silent for far too long.

        A request without a head is left at a replica whose server still answers: its scheduler may be in one long pass
        and say nothing meanwhile, and nobody else would answer sooner. `away`: how many seconds so far the replica had
        no turn. They do not count.
        """
        settings = self.settings
        silence = now - connection.last_byte_at - (away - connection.heard_away)
        lifeless = min(silence, now - place.alive_at)
        if silence > NEAR_SILENCE:
            connection.look_for_host()
        if lifeless > settings.idle_timeout and (connection.has_head or not place.is_answering):
            connection.finish(Outcome.STALLED if connection.has_head else Outcome.LOST)
        elif silence > max(settings.idle_timeout, settings.first_byte_timeout):
            connection.finish(Outcome.STUCK)
        elif lifeless > settings.idle_timeout / 2:
            place.doubted()

    def close(self) -> None:
        """Closes all idle connections."""
        for replica in list(self._idle):
            self.forget(replica)

    def __repr__(self) -> str:
        return f"<ConnectionPool busy={len(self.busy)} idle={sum(map(len, self._idle.values()))}>"
