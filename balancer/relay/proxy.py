"""The data path: admit, claim, attempt, relay, account. Read `serve` from top to bottom to follow a request."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from balancer import errors
from balancer.errors import ServeError, is_ollama
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.dial import OUR_OWN_LIMITS, Unresolved
from balancer.fleet.outcome import Outcome
from balancer.observe import trace_context
from balancer.observe.record import CLIENT_LEFT, Record, RequestObserver
from balancer.relay.answer_relay import AnswerRelay
from balancer.relay.auth import OPEN_PATHS, Key, Keys, bears
from balancer.relay.comments import STREAMING, Comments
from balancer.relay.continuation.continued_relay import ContinuedRelay
from balancer.relay.continuation.delivered import CONTINUED, CannotContinue
from balancer.relay.continuation.going_on import GoingOn, Unasked
from balancer.relay.cors import Cors
from balancer.relay.deaths import REFUSED as REFUSED_FOR
from balancer.relay.deaths import digest_of
from balancer.relay.directory import Destination, Directory
from balancer.relay.downstream import ClientConnection
from balancer.relay.failover import (
    HELD_BACK,
    PERHAPS_GONE,
    PERHAPS_TAKEN,
    UNTAKEN,
    final_error,
    may_continue,
    may_repeat,
    only_generates,
)
from balancer.relay.kept_responses import RESPONSES, ResponseRelay, kept_id
from balancer.relay.metering import Meter
from balancer.relay.paths import LISTS, PathKind, is_of_a_store
from balancer.relay.places import Place, Places
from balancer.relay.receiver import Receiver
from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.relay.unavailable import FULL_FOR
from balancer.relay.usage import OLLAMA
from balancer.relay.websocket import WebSocketRelay
from balancer.routing.admission import Waiter
from balancer.routing.prompt import Prompt

log = logging.getLogger("groundserve")

SERVED_METHODS: Final = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
OWN_METHODS = (b"GET", b"HEAD")
# Why a stream that broke did not continue, although it could have.
NO_REPLICA, TWO_DEATHS, TOO_LONG = "no replica", "two deaths", "too long"
RACE = "race"  # a retry's reason: the same request on a new connection to the same replica
NOTICED = 0.2  # seconds until a replica that has died is known to be gone, so that its return can be waited for
LOOKS = 4  # how often it is asked in that time whether that is known
COUNTING = 10.0  # seconds that another replica has to count the tokens that a client already has

MAX_PATH: Final = 1024  # characters of a path that a record keeps: 20,000 paths as long as a head exceed 1 GB

AnswerOwn = Callable[[Request, Reply], Coroutine[Any, Any, None]]


class SharedLimits(Protocol):
    """Where several processes serve the same keys: who has how many requests in progress in all of them."""

    async def enter(self, request: Request, key: Key) -> None:
        """Counts a request whose key has a limit; raises ServeError if it is reached."""

    def left(self, request: Request) -> None:
        """The request is over, whether it was counted or not."""


class Proxy:
    """Takes whole requests from client connections and sees each to its end."""

    def __init__(
        self,
        directory: Directory,
        loop: asyncio.AbstractEventLoop,
        observer: RequestObserver,
        answer_own: AnswerOwn,
        cors: Cors,
        keys: Keys | None = None,
        admin_key: str | None = None,
        meter: Meter | None = None,
        is_traced: bool = False,
        limits: SharedLimits | None = None,
    ) -> None:
        self.cors = cors
        self._directory = directory
        self._loop = loop
        self.observer = observer
        self._answer_own = answer_own
        self._keys = keys
        self._admin_key = admin_key
        self._meter = meter or Meter(loop.time)
        self._is_traced = is_traced
        self._limits = limits

    def check(self, request: Request) -> None:
        """Checks a request's head before its body is read; raises ServeError to refuse it."""
        if request.method not in SERVED_METHODS:
            raise errors.method_not_allowed(request.method.decode("latin-1"))
        if request.asks_for_method and self.cors.is_preflight(request):
            return
        self.cors.check(request)
        if request.kind is PathKind.ADMIN:
            is_admin = any(bears(credential, self._admin_key) for credential in request.credentials)
            if not is_admin or not self._directory.first.settings.admin_paths:
                refused = errors.nothing_kept if is_of_a_store(request.path) else errors.not_found
                raise refused(request.path)
            request.authorization = b""
            return
        if request.kind is PathKind.OWN and request.method not in OWN_METHODS:
            raise errors.method_not_allowed(request.method.decode("latin-1"), "GET, HEAD")
        if self._keys is not None and self._keys.are_wanted and request.path not in OPEN_PATHS:
            request.key = self._keys.admit(*request.credentials)
            request.authorization = b""  # the key is the balancer's; a replica has another one, or none

    def refuse(self, request: Request, reply: Reply, error: ServeError) -> None:
        """Answers a refused request."""
        record = self._record(request)
        if request.origin:
            reply.extra_fields = self.cors.fields(request)
        reply.refuse(error)
        self._finish(record, request, reply)

    async def serve(self, request: Request, reply: Reply, client: ClientConnection) -> None:
        """Handles one request from start to end. Cancelled when the client leaves."""
        reply.is_taken = True
        record = self._record(request)
        if request.origin:
            reply.extra_fields = self.cors.fields(request)
        key = request.key
        if key is not None:
            if key.is_at_limit:  # other requests with this key were admitted while this one's body was read
                self.refuse(request, reply, errors.key_at_limit(key.limit))
                return
            key.in_flight += 1
        comments = None
        try:
            if self._limits is not None and key is not None and key.limit < math.inf:
                await self._limits.enter(request, key)
            if request.asks_for_method and self.cors.is_preflight(request):
                reply.extra_fields += self.cors.preflight(request)
                reply.whole(204, (), b"")
            elif request.kind is PathKind.OWN or (request.path in LISTS and self._directory.lists_models):
                await self._answer_own(request, reply)
            else:
                if request.path.startswith(RESPONSES):
                    await self._directory.recall(request)
                elif is_ollama(request.path) and request.body:
                    # Ollama takes every body for JSON, and its own examples do not say that theirs are; SGLang minds.
                    request.replace_field(b"content-type", b"application/json")
                destination = self._directory.find(request)
                if self._is_traced:
                    _trace(request, record)
                if request.is_generating:
                    waits = self._meter.begin(destination, request, reply, record)
                    if waits is not None:
                        await waits
                every = destination.settings.keep_alive_comments
                if every and request.path in STREAMING and request.is_generating:
                    comments = Comments(self._loop, every, request, reply, destination.places.read)
                await self._relay(destination, request, reply, client, record)
        except ServeError as error:
            reply.refuse(error)
        except asyncio.CancelledError:
            if not reply.is_over:
                record.status = CLIENT_LEFT
        except Exception:
            log.exception("request %s failed here", record.id)
            message = "The balancer failed on this request; its log says why."
            reply.refuse(ServeError(500, "internal_error", message))
        finally:
            if comments is not None:
                comments.stop()
            if key is not None:
                key.in_flight -= 1
                if self._limits is not None:
                    self._limits.left(request)
            self._finish(record, request, reply)

    async def _relay(
        self, destination: Destination, request: Request, reply: Reply, client: ClientConnection, record: Record
    ) -> None:
        """Tries one replica after another until one answers or no attempt is left; raises ServeError."""
        places, settings = destination.places, destination.settings
        prompt = Prompt(request.path, request.body)
        waiter = Waiter(prompt, request.is_generating, [], request.is_waited_for, request.owner, request.received_at)
        if is_kept := request.path.startswith(RESPONSES):
            waiter.only = _keeper(destination, request)
        deaths = 0
        most_kept = settings.max_continued_bytes if settings.continue_broken and _may_go_on(request) else 0
        going: GoingOn | None = None
        digest = b""  # identifies the request in `deaths`, once a replica may have died of it
        self._refuse_killer(destination, request)
        destination.budget.deposit()
        while True:
            place = places.claim_now(waiter)
            if place is None:
                try:
                    place = await places.claim(waiter)
                except ServeError:
                    if going is not None:
                        record.not_continued = NO_REPLICA
                    raise
            record.member, record.reason, record.matched = place.replica.name, place.reason, place.matched
            record.attempts += 1
            record.queued += place.waited
            relay: AnswerRelay
            if is_kept:
                kept = destination.responses
                relay = ResponseRelay(place, request, reply, record, client, self.observer, most_kept, kept)
            elif request.opens_websocket:
                idle = settings.websocket_idle_timeout
                relay = WebSocketRelay(place, request, reply, record, client, self.observer, self._loop, idle)
            else:
                relay = AnswerRelay(place, request, reply, record, client, self.observer, most_kept)
            try:
                if going is None:
                    outcome = await self._attempt(destination, place, request, client, relay, record)
                else:
                    outcome = await self._go_on(going, destination, place, request, reply, client, record)
            except BaseException:  # the client left, or something failed here
                place.end(None, record)
                raise
            place.end(outcome, record)
            if outcome is Outcome.ANSWERED:
                if digest:
                    destination.deaths.acquit(digest)
                return
            relay.forget()
            if outcome not in UNTAKEN:
                deaths += 1
                digest = self._note_death(destination, place, request, outcome, record)
            if going is None and not relay.has_begun and outcome in HELD_BACK:
                outcome = Outcome.LOST  # as the client sees it, who has nothing of the answer
            if going is None or outcome not in UNTAKEN:  # else the client gets the error of the break
                retry_after = places.retry_turn() if outcome is Outcome.AWAY else record.full_for or FULL_FOR
                error = final_error(outcome, settings, retry_after, deaths)
            if going is None and relay.has_begun:
                going = self._going_on(relay, request, reply, record, error)
                if going.ending is not None:
                    destination.deaths.acquit(digest)
                    reply.body(going.ending)
                    reply.end()
                    return
            if not (await places.may_go_on(waiter) or (outcome in PERHAPS_GONE and await _is_noticed(places, waiter))):
                if going is not None:
                    record.not_continued = NO_REPLICA
                raise error
            if going is not None:
                if not may_continue(outcome, deaths, settings):
                    record.not_continued = TWO_DEATHS
                    raise error
            elif not self._may_repeat(outcome, deaths, destination, request):
                raise error
            record.retries += (outcome.value,)
            record.replica_status, record.full_for = 0, None

    def _may_repeat(self, outcome: Outcome, deaths: int, destination: Destination, request: Request) -> bool:
        is_harmless = outcome in PERHAPS_TAKEN and request.is_generating and only_generates(request.path, request.body)
        settings, budget, now = destination.settings, destination.budget, self._loop.time()
        return may_repeat(outcome, request.method, is_harmless, deaths, settings, budget, now)

    # Replicas that die

    def _refuse_killer(self, destination: Destination, request: Request) -> None:
        deaths = destination.deaths
        if deaths and request.is_generating and deaths.kills(digest_of(request.path, request.body), self._loop.time()):
            raise errors.kills_replicas(REFUSED_FOR)

    def _note_death(
        self, destination: Destination, place: Place, request: Request, outcome: Outcome, record: Record
    ) -> bytes:
        """Returns the request's digest, or b"" if the attempt does not suggest that the request killed its replica."""
        if outcome not in (Outcome.LOST, Outcome.BROKEN) or record.lost_host:
            return b""
        if not request.is_generating or not request.body:
            return b""
        digest = digest_of(request.path, request.body)
        destination.deaths.note(place.replica, digest, self._loop.time())
        return digest

    # Answers that break

    def _going_on(
        self, relay: AnswerRelay, request: Request, reply: Reply, record: Record, error: ServeError
    ) -> GoingOn:
        """Prepares a broken answer to continue on another replica; raises `error` if it cannot."""
        if relay.kept is None:
            if relay.could_be_kept:
                record.not_continued = TOO_LONG
            raise error
        try:
            return GoingOn(request, relay.kept.pieces, reply.hides_usage)
        except CannotContinue as refusal:
            record.not_continued = refusal.reason
            raise error from None

    async def _go_on(
        self,
        going: GoingOn,
        destination: Destination,
        place: Place,
        request: Request,
        reply: Reply,
        client: ClientConnection,
        record: Record,
    ) -> Outcome:
        """One attempt to continue an answer on another replica; raises ServeError if the new answer does not fit."""

        async def exchange(asked: Request, receiver: Receiver) -> Outcome:
            return await self._attempt(destination, place, asked, client, receiver, record)

        try:
            async with asyncio.timeout(COUNTING):
                asked, translation = await going.follow_up(place, exchange)
        except TimeoutError:
            return Outcome.SILENT
        except Unasked as unasked:
            return unasked.outcome
        except CannotContinue as refusal:
            raise _refused(record, refusal) from None
        most_kept = destination.settings.max_continued_bytes
        relay = ContinuedRelay(place, reply, record, translation, most_kept, asked.body)
        outcome = await exchange(asked, relay)
        if relay.refusal is not None:
            raise _refused(record, relay.refusal)
        return Outcome.ANSWERED if relay.has_ended else outcome

    async def _attempt(
        self,
        destination: Destination,
        place: Place,
        request: Request,
        client: ClientConnection,
        relay: Receiver,
        record: Record,
    ) -> Outcome:
        """One attempt at one replica: on an idle connection if there is one, else on a new one.

        A new one is also made if the replica closed the idle one before the request reached it.
        """
        pool, replica = destination.pool, place.replica
        head = request.head_for(replica, destination.replica_key)
        is_head = request.method == b"HEAD"
        if connection := pool.idle_connection(replica):
            client.take_from(connection)
            try:
                outcome = await connection.exchange(place, head, request.body, is_head, relay)
            finally:
                record.sent_at = connection.sent_at
            record.lost_host = connection.lost_host
            if outcome is not Outcome.REFUSED:
                return outcome
            record.retries += (RACE,)
        try:
            connection = await pool.connect(replica)
        except TimeoutError:
            return Outcome.UNREACHED
        except Unresolved as trouble:
            log.warning("replica %s could not be asked: %s", replica.name, trouble)
            return Outcome.UNKNOWN
        except OSError as error:
            if error.errno in OUR_OWN_LIMITS:
                raise errors.out_of_sockets(str(error.strerror)) from None
            return Outcome.REFUSED
        record.connect = connection.connected_in
        client.take_from(connection)
        try:
            outcome = await connection.exchange(place, head, request.body, is_head, relay)
        finally:
            record.sent_at = connection.sent_at
        record.lost_host = connection.lost_host
        return outcome

    def _record(self, request: Request) -> Record:
        id, method = request.id.decode("latin-1"), request.method.decode("latin-1")
        return Record(
            id, method, request.path[:MAX_PATH], request.received_at, client=request.address.decode("latin-1")
        )

    def _finish(self, record: Record, request: Request, reply: Reply) -> None:
        record.status = record.status or reply.status
        record.duration = self._loop.time() - request.received_at
        record.bytes_in = request.body_size
        record.bytes_out = reply.bytes_sent
        record.is_stream = reply.is_event_stream
        record.key = request.key.name if request.key else ""
        is_in_pieces = record.is_stream or (request.path in OLLAMA and reply.status == 200)
        if is_in_pieces and record.completion_tokens is None and record.attempts:
            delivered = reply.tail.delivered()
            record.prompt_tokens, record.completion_tokens = delivered.prompt, delivered.completion
        if reply.error is not None:
            record.error = reply.error.code
        self.observer.finished(record)


def _trace(request: Request, record: Record) -> None:
    """Makes the replica's spans children of ours, unless the client wants no record of this request."""
    record.trace = trace = trace_context.begin(request.traceparent)
    if trace is not None:
        request.replace_field(b"traceparent", trace.traceparent)
        if not trace.parent_id:
            request.replace_field(b"tracestate", None)  # it belonged to no trace, or to one that cannot be read


async def _is_noticed(places: Places, waiter: Waiter) -> bool:
    """Is it known within a moment that its replica has died, so that the request may wait for the return?

    It looks more than once: after a pause of this process, which a busy machine makes, timers run before what has
    arrived is read, so that the first look may come too early however late it is.
    """
    for _ in range(LOOKS):
        await asyncio.sleep(NOTICED / LOOKS)
        if await places.may_go_on(waiter):
            return True
    return False


def _keeper(destination: Destination, request: Request) -> ReplicaAddress | None:
    """The replica that keeps what the request builds on, if it builds on anything. Raises ServeError if none does.

    Where nobody has a key, a single replica answers for itself: it may have it from before this process began.
    """
    if not (id_ := kept_id(request)):
        return None
    responses = destination.responses
    keeper = responses.keeper(id_, request.issue)
    is_known = responses.known(id_) is not None
    if keeper is None and (request.key is not None or is_known or not destination.places.is_only_one):
        raise errors.response_not_kept(id_, request.path == RESPONSES)
    return keeper


def _may_go_on(request: Request) -> bool:
    """Is it in a format whose streams can continue elsewhere? (Whether this one can is checked when it breaks.)"""
    return request.path in CONTINUED and request.method == b"POST"


def _refused(record: Record, refusal: CannotContinue) -> ServeError:
    record.not_continued = refusal.reason
    return errors.stream_broken(f"the replica went away, and no other one could go on with it ({refusal.reason}).")
