"""The data path: admit, claim, attempt, relay, account. Read `serve` from top to bottom: that is a request's way."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from typing import Any

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.claim import Claim
from balancer.fleet.dial import Unresolved
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.fleet.probe_connection import OUR_OWN_LIMITS
from balancer.observe.record import Record, RequestObserver, Spans
from balancer.relay.auth import OPEN_PATHS, Keys, bears
from balancer.relay.comments import STREAMING, Comments
from balancer.relay.cors import Cors
from balancer.relay.downstream import ClientConnection
from balancer.relay.failover import RULES, SAFE_METHODS, RetryBudget, final_error, may_repeat
from balancer.relay.paths import Kind
from balancer.relay.reply import Reply
from balancer.relay.request import Headers, Request
from balancer.relay.unavailable import Unavailable, retry_after
from balancer.relay.upstream import Outcome, Pool
from balancer.routing.admission import Admission, Waiter
from balancer.routing.policies import Choice
from balancer.routing.prompt import Prompt

log = logging.getLogger("groundserve")

CLIENT_LEFT = 499  # nginx's status for it, only ever seen in logs and metrics
SERVED_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))
OWN_METHODS = (b"GET", b"HEAD")
BROKEN_STATUSES = (500, 502, 503, 504)
RACE = "race"  # among the reasons of retries: the same request on a new connection to the same member
TURNED_AWAY = ("queue_full", "queue_timeout", "replicas_busy")  # more replicas would have taken it
UNSENT = (Outcome.REFUSED, Outcome.UNREACHED, Outcome.UNKNOWN)

MAX_PATH = 1024  # characters that are remembered of a path: a head's worth, 20,000 times, is more than a GB

AnswerOwn = Callable[[Request, Reply], Coroutine[Any, Any, None]]


class Proxy:
    """Takes whole requests from the downstream side and sees each to its end."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        pool: Pool,
        observer: RequestObserver,
        answer_own: AnswerOwn,
        cors: Cors,
        replica_key: bytes | None = None,
        keys: Keys | None = None,
        admin_key: str | None = None,
    ) -> None:
        self.fleet = fleet
        self.settings = fleet.settings
        self.admission = admission
        self.pool = pool
        self.budget = RetryBudget()
        self.observer = observer
        self._answer_own = answer_own
        self.cors = cors
        self._replica_key = replica_key
        self._keys = keys
        self._admin_key = admin_key

    def check(self, request: Request) -> None:
        """Refuses by the head alone, before a body is read; raises ServeError."""
        if request.method not in SERVED_METHODS:
            raise errors.method_not_allowed(request.method.decode("latin-1"))
        if self.cors.is_preflight(request):
            return
        self.cors.check(request)
        if request.kind is Kind.ADMIN:
            is_admin = any(bears(credential, self._admin_key) for credential in request.credentials)
            if not self.settings.admin_paths or not is_admin:
                raise errors.not_found(request.path)
            request.authorization = b""
            return
        if request.kind is Kind.OWN and request.method not in OWN_METHODS:
            raise errors.method_not_allowed(request.method.decode("latin-1"), "GET, HEAD")
        if self._keys is not None and request.path not in OPEN_PATHS:
            request.key = self._keys.admit(*request.credentials)
            request.authorization = b""  # it is for this door; a replica has another key, or none

    def refuse(self, request: Request, reply: Reply, error: ServeError) -> None:
        """Answers a request that never got to `serve`."""
        record = self._record(request)
        reply.extra_fields = self.cors.fields(request)
        reply.refuse(error)
        self._finish(record, request, reply)

    async def serve(self, request: Request, reply: Reply, client: ClientConnection) -> None:
        """One request's whole way. Cancelled when the client leaves."""
        record = self._record(request)
        reply.extra_fields = self.cors.fields(request)
        key = request.key
        if key is not None:
            if key.is_at_limit:  # others of its requests came through the door while this one's body was read
                self.refuse(request, reply, errors.key_at_limit(key.limit))
                return
            key.in_flight += 1
        comments = None
        if (every := self.settings.keep_alive_comments) and request.path in STREAMING and request.is_generating:
            comments = Comments(self.pool.loop, every, request, reply, self.admission.read)
        try:
            if self.cors.is_preflight(request):
                reply.extra_fields += self.cors.preflight(request)
                reply.whole(204, (), b"")
            elif request.kind is Kind.OWN:
                await self._answer_own(request, reply)
            else:
                await self._relay(request, reply, client, record)
        except ServeError as error:
            self.admission.turned_away_total += request.is_generating and error.code in TURNED_AWAY
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
            self._finish(record, request, reply)

    async def _relay(self, request: Request, reply: Reply, client: ClientConnection, record: Record) -> None:
        """Attempts at one member after the other, until one answers or nothing is left; raises ServeError."""
        self.admission.arrived_total += request.is_generating
        prompt = Prompt(request.path, request.body)
        if self.admission.must_read(prompt):
            await self.admission.read(prompt)
        waiter = Waiter(prompt, request.is_generating, is_waited_for=request.is_waited_for)
        outcome = Outcome.REFUSED
        sent = 0
        self.budget.deposit()
        while True:
            claim = self.admission.claim_now(waiter)
            if claim is None:
                asked_at = self.pool.loop.time()
                claim = await self.admission.claim(waiter)
                record.queued += self.pool.loop.time() - asked_at
            with claim as member:
                choice = claim.choice
                record.member, record.reason, record.matched = member.name, choice.reason, choice.matched
                record.attempts += 1
                relay = _Relay(self, claim, request, reply, record, client)
                outcome = await self._attempt(member, request, client, relay, record)
                relay.account(outcome)
            if outcome is Outcome.ANSWERED:
                if record.prompt_tokens and record.texts == 1:  # of a batch the policy knows the first prompt only
                    policy = self.admission.policy
                    policy.answered(choice, prompt, record.prompt_tokens, record.cached_tokens)
                return
            waiter.tried.append(member)
            sent += outcome not in UNSENT
            now = self.pool.loop.time()
            error = final_error(outcome, self.settings, relay.retry_after)
            if not self.fleet.has_other(waiter.tried):
                raise error
            if not may_repeat(outcome, request.method, sent, self.settings, self.budget, now):
                raise error
            record.retries += (outcome.value,)

    async def _attempt(
        self, member: Member, request: Request, client: ClientConnection, relay: "_Relay", record: Record
    ) -> Outcome:
        """One attempt at one member: on an idle connection if there is one, else (or after the race) on a new one."""
        head = request.head_for(member, self._replica_key)
        is_head = request.method == b"HEAD"
        raced = False
        if connection := self.pool.idle_connection(member):
            client.take_from(connection)
            outcome = await connection.exchange(head, request.body, is_head, relay)
            raced = outcome is Outcome.LOST and connection.was_closing()
            if outcome is not Outcome.REFUSED and not raced:
                return outcome
        if raced:
            record.retries += (RACE,)
        try:
            connection = await self.pool.connect(member)
        except TimeoutError:
            outcome = Outcome.UNREACHED
        except Unresolved as trouble:
            log.warning("replica %s could not be asked: %s", member.name, trouble)
            outcome = Outcome.UNKNOWN
        except OSError as error:
            if error.errno in OUR_OWN_LIMITS:
                raise errors.out_of_sockets(str(error.strerror)) from None
            outcome = Outcome.REFUSED
        else:
            relay.connected(connection.connected_in)
            client.take_from(connection)
            outcome = await connection.exchange(head, request.body, is_head, relay)
        if raced and outcome in UNSENT:
            relay.account(outcome)
            return Outcome.LOST  # it may have begun on this before it went away: what was sent stays sent
        return outcome

    def _record(self, request: Request) -> Record:
        path = request.path[:MAX_PATH]
        return Record(request.id.decode("latin-1"), request.method.decode("latin-1"), path, request.received_at)

    def _finish(self, record: Record, request: Request, reply: Reply) -> None:
        record.status = record.status or reply.status
        record.duration = self.pool.loop.time() - request.received_at
        record.bytes_in = request.body_size
        record.bytes_out = reply.bytes_sent
        record.is_stream = reply.is_event_stream
        record.key = request.key.name if request.key else ""
        if reply.error is not None:
            record.error = reply.error.code
        self.observer.finished(record)


class _Relay:
    """A replica's answer on its way to the client: upstream calls it with each piece as it comes."""

    __slots__ = (
        "_claim",
        "_client",
        "_gaps",
        "_held",
        "_is_full",
        "_last_at",
        "_member",
        "_proxy",
        "_record",
        "_reply",
        "_request",
        "retry_after",
        "status",
    )

    def __init__(
        self,
        proxy: Proxy,
        claim: Claim[Choice],
        request: Request,
        reply: Reply,
        record: Record,
        client: ClientConnection,
    ) -> None:
        self._proxy = proxy
        self._claim = claim
        self._member = claim.member
        self._request = request
        self._reply = reply
        self._record = record
        self._client = client
        self._gaps: Spans | None = None
        self._held: Unavailable | None = None
        self._is_full = False  # the replica says so
        self._last_at = 0.0
        self.status = 0
        self.retry_after = 1

    def connected(self, seconds: float) -> None:
        self._record.connect = seconds

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        self.status = status
        if status != 503:
            self._begin(status, headers, length)
        elif (seconds := retry_after(headers)) is not None:
            self.retry_after, self._is_full = seconds, True
            return False
        elif self._request.method in SAFE_METHODS:
            return False  # another may well answer, whatever this one means; and of HEAD nothing else is to be had
        else:
            self._held = Unavailable(headers, length)
        return True

    def _begin(self, status: int, headers: Headers, length: int | None) -> None:
        record = self._record
        own = b"X-Replica-Id: %b\r\n" % self._member.name.encode("latin-1", "replace")
        if self._request.wants_explanation:
            matched = b"" if record.matched is None else b"; matched=%.2f" % record.matched
            own += b"X-Route-Reason: %b%b; attempts=%d; queued=%.3f\r\n" % (
                record.reason.encode(),
                matched,
                record.attempts,
                record.queued,
            )
        if 300 <= status < 400:
            headers = _leading_here(headers, self._member)
        self._reply.begin(status, headers, length, own)
        self._client.release(self._request)  # the replica has it; long answers need not keep large prompts in memory
        if self._reply.is_event_stream:
            self._gaps = self._proxy.observer.gaps(self._member)

    def _let_go(self, held: Unavailable) -> None:
        """What was held back is an answer like any other."""
        self._held = None
        self._begin(self.status, held.headers, held.length)
        for piece in held.pieces:
            self.on_body(piece)

    def on_body(self, data: bytes) -> None:
        if self._held is not None:
            if not self._held.holds(data):
                self._let_go(self._held)
            return
        now = self._member.last_byte_at  # when this very piece was read
        if self._record.first_byte is None:
            self._record.first_byte = now - self._record.received_at
            self._claim.begun(is_computed=self.status == 200)
        elif self._gaps is not None:
            self._gaps.note(now - self._last_at)
        self._last_at = now
        self._reply.body(data)

    def on_end(self, seconds: float) -> bool:
        if self._held is not None:
            if self._held.says_full(self._request.path, seconds):
                self._is_full = True
                return False
            self._let_go(self._held)
        record, counts = self._record, self._reply.tail.counts()
        record.prompt_tokens, record.completion_tokens = counts.prompt, counts.completion
        record.cached_tokens, record.texts = counts.cached, counts.texts
        self._reply.end()
        return True

    def account(self, outcome: Outcome) -> None:
        """Tells the fleet what this attempt says of the member."""
        fleet, member = self._proxy.fleet, self._member
        if outcome is Outcome.ANSWERED:
            record = self._record
            member.prompt_tokens_total += record.prompt_tokens or 0
            member.cached_tokens_total += record.cached_tokens or 0
            fleet.answered(self._claim, is_well=self.status not in BROKEN_STATUSES)
        elif outcome is Outcome.REFUSED:
            fleet.refused(member)
        elif outcome is Outcome.BUSY:
            if self._is_full:
                fleet.busy(member, self.retry_after)
        elif RULES[outcome].is_failure:
            fleet.failed(member)
        elif RULES[outcome].is_doubtful:
            fleet.answered(self._claim, is_well=False)


def _leading_here(headers: Headers, member: Member) -> Headers:
    """A replica's redirects to itself as paths, for it is this endpoint that its clients reach.

    SGLang sends /generate/ to /generate, says so with a whole URL, and takes the scheme from X-Forwarded-Proto.
    """
    itself = re.compile(rb"\Ahttps?://%b(?=/[^/])" % re.escape(member.authority))
    return [(name, itself.sub(b"", value) if name.lower() == b"location" else value) for name, value in headers]
