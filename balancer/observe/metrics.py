"""Prometheus metrics: the counts so far, and the state of the fleet at the moment of the scrape."""

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from copy import copy
from itertools import accumulate
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Header
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from balancer.contract.words import Status
from balancer.observe.tally import Histogram, Tallies
from balancer.service import Service

PIECE = 200  # samples encoded before other work gets its turn
HEADING = re.compile(rb"\A(# .*\n)+")
EOF = b"# EOF\n"

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | InfoMetricFamily


def registry_of(collector: Collector) -> CollectorRegistry:
    """A new registry: the balancer's collector, this process's CPU and memory, and its Python version."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def metrics_router(registry: CollectorRegistry) -> APIRouter:
    """`GET /metrics`, in the format named by the scraper's `Accept` header."""
    router = APIRouter()

    @router.get("/metrics")
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        encode, content_type = choose_encoder(accept)
        return Response(await encoded(registry, encode), media_type=content_type)

    return router


async def encoded(registry: Collector, encode: Callable[[Any], bytes]) -> bytes:
    """The text of all families, encoded a few milliseconds at a time, so that streams are not held up."""
    pieces = []
    for family in registry.collect():
        for start in range(0, max(1, len(family.samples)), PIECE):
            part = copy(family)
            part.samples = family.samples[start : start + PIECE]
            text = encode(_Families(part)).removesuffix(EOF)
            pieces.append(HEADING.sub(b"", text) if start else text)
            await asyncio.sleep(0)
    # The end mark, which only OpenMetrics has, is what encoding nothing gives.
    return b"".join((*pieces, encode(_Families())))


class _Families(Collector):
    """A collector of the given families."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


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


class BalancerCollector(Collector):
    """Builds every series anew at each scrape, so nothing is left of a replica or key that is gone.

    The label `replica` holds a replica's name. It is empty where there is no replica, or it has left meanwhile.
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

    def collect(self) -> Iterator[Family]:
        self._tallies.count()
        yield from self._requests()
        yield from self._latencies()
        yield from self._tokens()
        yield from self._replicas()
        yield from self._queues()
        yield from self._here()
        if self._keys is not None:
            yield from self._by_key(self._keys)

    def _requests(self) -> Iterator[Family]:
        requests = _counter("requests", "Requests that ended.", "replica", "path", "status")
        for name, tally in (*self._tallies.members.items(), ("", self._tallies.nobody)):
            for (path, status), count in sorted(tally.requests.items()):
                requests.add_metric((name, path, status), count)
        yield requests
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
        members = self._tallies.members.items()
        everyone = (*members, ("", self._tallies.nobody))
        yield _histogram(
            "time_to_first_token_seconds",
            "From a streaming request's head to the first byte of its answer.",
            ((name, tally.ttft) for name, tally in members),
        )
        yield _histogram(
            "inter_token_latency_seconds",
            "Between two reads of a streamed answer, from its first byte on.",
            ((name, tally.inter_token) for name, tally in members),
        )
        yield _histogram(
            "request_duration_seconds",
            "From a request's head to the end of its answer.",
            ((name, tally.duration) for name, tally in everyone),
        )
        yield _histogram(
            "connect_seconds",
            "Of new connections to a replica.",
            ((name, tally.connect) for name, tally in members),
        )
        wait = HistogramMetricFamily("groundserve_queue_wait_seconds", "How long requests waited for a replica.")
        wait.add_metric((), *_buckets(self._tallies.queue_wait))
        yield wait

    def _tokens(self) -> Iterator[Family]:
        members = self._tallies.members.items()
        for name, said in (
            ("prompt_tokens", "Tokens of prompts, where the answer says how many."),
            ("completion_tokens", "Generated tokens, where the answer says how many."),
            ("cached_tokens", "Prompt tokens that were in the replica's cache, as its answer says."),
            ("predicted_cached_tokens", "Prompt tokens that prefix_aware expected in the replica's cache."),
        ):
            field = "predicted_tokens" if name == "predicted_cached_tokens" else name
            yield _by_label(name, said, "replica", {member: getattr(tally, field) for member, tally in members})
        yield _histogram(
            "cache_prediction_error_ratio",
            "By how much the cached share that prefix_aware predicted for a prompt was off.",
            ((name, tally.misjudged) for name, tally in members),
        )

    def _replicas(self) -> Iterator[Family]:
        now = self._services[0].fleet.clock()
        by_status = _gauge("replicas", "Replicas by status.", "service", "status")
        for service in self._services:
            statuses = [member.status(now) for member in service.fleet.shown()]
            for status in Status:
                by_status.add_metric((service.facts.name, status.value), statuses.count(status))
        yield by_status
        members = [member for service in self._services for member in service.fleet.shown()]
        up = _gauge("replica_up", "1 if the replica may get requests.", "replica")
        in_flight = _gauge("in_flight", "Requests at the replica now.", "replica")
        limit = _gauge("in_flight_limit", "Generating requests that the replica may have at once.", "replica")
        failures = _counter("replica_failures", "Failed attempts at the replica.", "replica")
        ejections = _counter("ejections", "How often the replica was ejected for its failures.", "replica")
        probes = _counter("probes", "Answers to readiness probes.", "replica", "probe", "result")
        wakes = _counter("wakes", "How often the replica got its turn on GPUs that it shares.", "replica")
        away = _counter("away_seconds", "Time in which the replica had no turn on GPUs that it shares.", "replica")
        where = InfoMetricFamily("groundserve_replica", "What runs the replica, and where.", labels=("replica",))
        for member in members:
            label = (member.name,)
            where.add_metric(label, {"infra": member.listing.infra, "node": member.listing.node})
            if (tenancy := member.tenancy) is not None:
                wakes.add_metric(label, tenancy.wakes)
                away.add_metric(label, tenancy.away(now))
            up.add_metric(label, member.is_available(now))
            in_flight.add_metric(label, member.in_flight)
            limit.add_metric(label, member.limit)
            failures.add_metric(label, member.failures_total)
            ejections.add_metric(label, member.outlier.ejections_total)
            for probe, result in (("ready", member.ready), ("service", member.service)):
                probes.add_metric((member.name, probe, "pass"), result.passes_total)
                probes.add_metric((member.name, probe, "fail"), result.failures_total)
        yield from (where, up, in_flight, limit, failures, ejections, probes, wakes, away)

    def _queues(self) -> Iterator[Family]:
        depth = _gauge("queue_depth", "Requests that wait for a replica.", "service")
        wait = _gauge("queue_expected_wait_seconds", "How long a new request would wait for a replica.", "service")
        info = InfoMetricFamily("groundserve_balancer", "How this balancer is set up.", labels=("service",))
        for service in self._services:
            depth.add_metric((service.facts.name,), service.admission.queue_depth)
            wait.add_metric((service.facts.name,), service.admission.expected_wait())
            info.add_metric((service.facts.name,), {"policy": service.admission.policy.name})
        yield from (depth, wait, info)

    def _here(self) -> Iterator[Family]:
        for name, said, value in (
            ("client_connections", "Open client connections.", len(self._clients.connections)),
            (
                "buffered_bytes",
                "Bytes held of requests, and of answers that may have to continue elsewhere.",
                self._clients.buffered,
            ),
        ):
            yield GaugeMetricFamily(f"groundserve_{name}", said, value=value)
        lag = HistogramMetricFamily(
            "groundserve_loop_lag_seconds", "How late the event loop was, measured ten times a second."
        )
        lag.add_metric((), *_buckets(self._tallies.loop_lag))
        yield lag

    def _by_key(self, keys: Iterable[NamedKey]) -> Iterator[Family]:
        requests = _counter("key_requests", "Requests by the name of their API key.", "key", "status")
        tokens = _counter("key_tokens", "Tokens by the name of the API key.", "key", "kind")
        in_flight = _gauge("key_in_flight", "Requests of this API key in flight.", "key")
        queued = _gauge("key_queued", "Requests of this API key that wait for their first replica.", "key")
        for key in keys:
            in_flight.add_metric((key.name,), key.in_flight)
            queued.add_metric((key.name,), sum(s.admission.queued_of(key.name) for s in self._services))
            tally = self._tallies.keys.get(key.name)
            if tally is None:
                continue
            for status, count in sorted(tally.requests.items()):
                requests.add_metric((key.name, status), count)
            tokens.add_metric((key.name, "prompt"), tally.prompt_tokens)
            tokens.add_metric((key.name, "completion"), tally.completion_tokens)
        yield from (requests, tokens, in_flight, queued)


def _counter(name: str, said: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"groundserve_{name}", said, labels=labels)


def _gauge(name: str, said: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"groundserve_{name}", said, labels=labels)


def _single(name: str, said: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"groundserve_{name}", said, value=value)


def _by_label(name: str, said: str, label: str, counts: dict[str, int]) -> CounterMetricFamily:
    family = _counter(name, said, label)
    for value, count in sorted(counts.items()):
        family.add_metric((value,), count)
    return family


def _histogram(name: str, said: str, members: Iterable[tuple[str, Histogram]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"groundserve_{name}", said, labels=("replica",))
    for member, histogram in members:
        family.add_metric((member,), *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts, as Prometheus wants them, and the sum."""
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True)), histogram.total
