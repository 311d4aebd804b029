"""Prometheus metrics: the counts so far, and the state of the fleet at the moment of the scrape."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Annotated, Protocol

from fastapi import APIRouter, Header
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder

from balancer.contract.words import Status
from balancer.fleet.member import Member
from balancer.observe.exposition import Family, counter, gauge, histogram, label, line
from balancer.observe.tally import Histogram, MemberTally, Tallies
from balancer.service import Service

PIECE = 0.002  # seconds of writing before other work gets its turn


def metrics_router(figures: "Figures") -> APIRouter:
    """`GET /metrics`, in the format named by the scraper's `Accept` header."""
    router = APIRouter()
    process = CollectorRegistry()  # CPU and memory of this process, and its Python version
    ProcessCollector(registry=process)
    PlatformCollector(registry=process)

    @router.get("/metrics")
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        # None of our names needs escaping, so however the scraper would like that, this is right.
        encode, content_type = choose_encoder(accept.replace("escaping=", "unused="))
        ours = await written(figures, is_openmetrics=content_type.startswith("application/openmetrics-text"))
        return Response(ours + encode(process), media_type=content_type)

    return router


async def written(figures: "Figures", *, is_openmetrics: bool) -> bytes:
    """The text of all families, without OpenMetrics' end mark; `PIECE` at a time, so that streams are not held up."""
    pieces, piece, until = [], [], time.perf_counter() + PIECE
    for family in figures.families():
        for text in chain((family.heading(is_openmetrics=is_openmetrics),), family.lines):
            piece.append(text)
            if time.perf_counter() > until:
                pieces.append("".join(piece).encode())
                piece.clear()
                await asyncio.sleep(0)
                until = time.perf_counter() + PIECE
    pieces.append("".join(piece).encode())
    return b"".join(pieces)


class NamedKey(Protocol):
    """An API key, as far as the metrics show it."""

    @property
    def name(self) -> str: ...

    @property
    def in_flight(self) -> int: ...


class Clients(Protocol):
    """The open connections, and the bytes of request bodies that are held in memory."""

    @property
    def connections(self) -> Sized: ...

    @property
    def buffered(self) -> int: ...


class Figures:
    """Builds every series anew at each scrape, so nothing is left of a replica or key that is gone.

    The label `replica` holds a replica's name. It is empty where there is no replica, or it has left meanwhile. Other
    work goes on while `families` are written, so each of them takes the replicas of when it began.
    """

    def __init__(
        self,
        services: Sequence[Service],
        tallies: Tallies,
        keys: Iterable[NamedKey] | None,
        clients: Clients,
    ) -> None:
        self._services = services
        self._tallies = tallies
        self._keys = keys
        self._clients = clients

    def families(self) -> Iterator[Family]:
        self._tallies.count()
        yield from self._requests()
        yield from self._latencies()
        yield from self._tokens()
        yield from self._replicas()
        yield from self._queues()
        yield from self._here()
        if self._keys is not None:
            yield from self._by_key([*self._keys])

    def _members(self) -> list[tuple[str, MemberTally]]:
        """The tallies of all replicas, each with its label."""
        return [(label("replica", name), tally) for name, tally in self._tallies.members.items()]

    def _everyone(self) -> list[tuple[str, MemberTally]]:
        return [*self._members(), (label("replica", ""), self._tallies.nobody)]

    def _requests(self) -> Iterator[Family]:
        yield counter(
            "groundserve_requests",
            "Requests that ended.",
            (
                line("groundserve_requests_total", (label("path", path), replica, label("status", status)), count)
                for replica, tally in self._everyone()
                for (path, status), count in sorted(tally.requests.items())
            ),
        )
        yield _by_label(
            "errors", "Requests that the balancer itself refused or ended, by code.", "code", self._tallies.errors
        )
        yield _by_label(
            "retries", "Failed attempts that were repeated, by how they failed.", "reason", self._tallies.retries
        )
        yield _single("continued", "Streams that broke and went on at another replica.", self._tallies.continued)
        yield _by_label(
            "not_continued",
            "Streams that broke and could not go on elsewhere, by why.",
            "reason",
            self._tallies.not_continued,
        )
        yield _single("received_bytes", "Bytes of request bodies.", self._tallies.bytes_in)
        yield _single("sent_bytes", "Bytes of response bodies.", self._tallies.bytes_out)

    def _latencies(self) -> Iterator[Family]:
        yield histogram(
            "groundserve_time_to_first_token_seconds",
            "From a streaming request's head to the first byte of its answer.",
            ((replica, tally.ttft) for replica, tally in self._members()),
        )
        yield histogram(
            "groundserve_inter_token_latency_seconds",
            "Between two reads of a streamed answer, from its first byte on.",
            ((replica, tally.inter_token) for replica, tally in self._members()),
        )
        yield histogram(
            "groundserve_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ((replica, tally.duration) for replica, tally in self._everyone()),
        )
        yield histogram(
            "groundserve_connect_seconds",
            "Of new connections to a replica.",
            ((replica, tally.connect) for replica, tally in self._members()),
        )
        yield _histogram_here("queue_wait_seconds", "How long requests waited for a replica.", self._tallies.queue_wait)

    def _tokens(self) -> Iterator[Family]:
        for name, field, said in (
            ("prompt_tokens", "prompt_tokens", "Tokens of prompts, where the answer says how many."),
            ("completion_tokens", "completion_tokens", "Generated tokens, where the answer says how many."),
            ("cached_tokens", "cached_tokens", "Prompt tokens that were in the replica's cache, as its answer says."),
            (
                "predicted_cached_tokens",
                "predicted_tokens",
                "Prompt tokens that prefix_aware expected in the replica's cache.",
            ),
        ):
            yield _counts(name, said, ((replica, getattr(tally, field)) for replica, tally in self._members()))
        yield histogram(
            "groundserve_cache_prediction_error_ratio",
            "By how much the cached share that prefix_aware predicted for a prompt was off.",
            ((replica, tally.misjudged) for replica, tally in self._members()),
        )

    def _replicas(self) -> Iterator[Family]:
        now = self._services[0].fleet.clock()
        yield gauge("groundserve_replicas", "Replicas by status.", self._by_status(now))
        yield _values(
            "scaled_to_zero",
            "1 if the service has no replica until a request wakes it.",
            ((label("service", service.facts.name), int(service.fleet.is_asleep)) for service in self._services),
        )
        members = [
            (label("replica", member.name), member) for service in self._services for member in service.fleet.shown()
        ]
        tenants = [(replica, member.tenancy) for replica, member in members if member.tenancy is not None]
        yield Family(
            "groundserve_replica",
            "info",
            "What runs the replica, and where.",
            (
                line("groundserve_replica_info", (*_labels(infra=m.listing.infra, node=m.listing.node), replica), 1)
                for replica, m in members
            ),
        )
        yield _values(
            "replica_up", "1 if the replica may get requests.", ((r, int(m.is_available(now))) for r, m in members)
        )
        yield _values("in_flight", "Requests at the replica now.", ((r, m.in_flight) for r, m in members))
        yield _values(
            "in_flight_limit",
            "Generating requests that the replica may have at once.",
            ((r, m.limit) for r, m in members),
        )
        yield _counts(
            "replica_failures", "Failed attempts at the replica.", ((r, m.failures_total) for r, m in members)
        )
        yield _counts(
            "ejections",
            "How often the replica was ejected for its failures.",
            ((r, m.outlier.ejections_total) for r, m in members),
        )
        yield counter("groundserve_probes", "Answers to readiness probes.", (_probe_lines(r, m) for r, m in members))
        yield _counts(
            "wakes", "How often the replica got its turn on GPUs that it shares.", ((r, t.wakes) for r, t in tenants)
        )
        yield _counts(
            "away_seconds",
            "Time in which the replica had no turn on GPUs that it shares.",
            ((r, t.away(now)) for r, t in tenants),
        )

    def _by_status(self, now: float) -> Iterator[str]:
        for service in self._services:
            counts = Counter(member.status(now) for member in service.fleet.shown())
            for status in Status:
                labels = _labels(service=service.facts.name, status=status.value)
                yield line("groundserve_replicas", labels, counts[status])

    def _queues(self) -> Iterator[Family]:
        services = [(label("service", service.facts.name), service.admission) for service in self._services]
        yield _values(
            "queue_depth", "Requests that wait for a replica.", ((s, queue.queue_depth) for s, queue in services)
        )
        yield _values(
            "queue_expected_wait_seconds",
            "How long a new request would wait for a replica.",
            ((s, queue.expected_wait()) for s, queue in services),
        )
        yield Family(
            "groundserve_balancer",
            "info",
            "How this balancer is set up.",
            (line("groundserve_balancer_info", (label("policy", q.policy.name), s), 1) for s, q in services),
        )

    def _here(self) -> Iterator[Family]:
        yield _values("client_connections", "Open client connections.", (("", len(self._clients.connections)),))
        yield _values(
            "buffered_bytes",
            "Bytes held of requests, and of answers that may have to continue elsewhere.",
            (("", self._clients.buffered),),
        )
        yield _histogram_here(
            "loop_lag_seconds", "How late the event loop was, measured ten times a second.", self._tallies.loop_lag
        )

    def _by_key(self, keys: Sequence[NamedKey]) -> Iterator[Family]:
        used = [(key.name, tally) for key in keys if (tally := self._tallies.keys.get(key.name)) is not None]
        yield counter(
            "groundserve_key_requests",
            "Requests by the name of their API key.",
            (
                line("groundserve_key_requests_total", _labels(key=name, status=status), count)
                for name, tally in used
                for status, count in sorted(tally.requests.items())
            ),
        )
        yield counter(
            "groundserve_key_tokens",
            "Tokens by the name of the API key.",
            (
                line("groundserve_key_tokens_total", _labels(key=name, kind=kind), count)
                for name, tally in used
                for kind, count in (("prompt", tally.prompt_tokens), ("completion", tally.completion_tokens))
            ),
        )
        yield _values(
            "key_in_flight",
            "Requests of this API key in flight.",
            ((label("key", key.name), key.in_flight) for key in keys),
        )
        yield _values(
            "key_queued",
            "Requests of this API key that wait for their first replica.",
            (
                (label("key", key.name), sum(service.admission.queued_of(key.name) for service in self._services))
                for key in keys
            ),
        )


def _labels(**labels: str) -> tuple[str, ...]:
    return tuple(label(name, value) for name, value in labels.items())


def _values(name: str, said: str, values: Iterable[tuple[str, float]]) -> Family:
    """A gauge of values that have a label each."""
    name = f"groundserve_{name}"
    return gauge(name, said, (line(name, (labelled,), value) for labelled, value in values))


def _counts(name: str, said: str, counts: Iterable[tuple[str, float]]) -> Family:
    """A counter of counts that have a label each."""
    name = f"groundserve_{name}"
    return counter(name, said, (line(f"{name}_total", (labelled,), count) for labelled, count in counts))


def _single(name: str, said: str, count: float) -> Family:
    return _counts(name, said, (("", count),))


def _by_label(name: str, said: str, by: str, counts: Mapping[str, int]) -> Family:
    return _counts(name, said, ((label(by, value), count) for value, count in sorted(counts.items())))


def _histogram_here(name: str, said: str, values: Histogram) -> Family:
    """A histogram of the whole process."""
    return histogram(f"groundserve_{name}", said, (("", values),))


def _probe_lines(replica: str, member: Member) -> str:
    return "".join(
        line("groundserve_probes_total", (f'probe="{probe}"', replica, f'result="{result}"'), count)
        for probe, found in (("ready", member.ready), ("service", member.service))
        for result, count in (("fail", found.failures_total), ("pass", found.passes_total))
    )
