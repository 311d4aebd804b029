"""Sends what became of each traced request to an OpenTelemetry collector, in a thread of its own.

Needs the extra `tracing`. A span for the request, and one each for its wait in the queue, for connecting, for the time
to the first byte and for the rest of the answer; those of retried requests are about the last attempt.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from balancer.errors import ConfigError
from balancer.observe.record import Record
from balancer.observe.trace_context import Trace, drawn

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger("groundserve")

MOST = 10_000  # requests that wait to be sent; beyond, the oldest are dropped
AT_ONCE = 100  # requests in one message: the thread holds the interpreter for a moment only
EVERY = 0.5  # seconds
PATIENCE = 5.0  # seconds for one message, repeated attempts included
SAID_AGAIN = 60.0
CLIENT_LEFT = 499


class Tracing:
    """Takes finished requests; `name` is the service's name. Raises ConfigError if `url` or the extra is no good."""

    def __init__(self, url: str, name: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--otlp {url}: write the collector's address, as in http://localhost:4318")
        try:
            import requests
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        except ImportError:
            raise ConfigError("--otlp needs OpenTelemetry: pip install '.[tracing]' in groundserve's folder") from None
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # a failure is said once, below
        session = requests.Session()
        session.trust_env = False
        endpoint = url if parts.path.strip("/") else f"{url.rstrip('/')}/v1/traces"
        self._exporter = OTLPSpanExporter(endpoint, timeout=PATIENCE, session=session)
        self._resource = Resource.create({SERVICE_NAME: name})
        self._at = parts.netloc.rpartition("@")[2]  # what stands before it is secret
        self._waiting: deque[Record] = deque(maxlen=MOST)
        self._is_closing = threading.Event()
        self._said = -SAID_AGAIN
        self._thread = threading.Thread(target=self._run, daemon=True, name="tracing")
        self._thread.start()

    def finished(self, record: Record) -> None:
        """Takes a request that is over, if it is traced."""
        if record.trace is not None:
            self._waiting.append(record)

    def close(self) -> None:
        """Sends what waits, and ends; gives up after a few seconds. Blocks."""
        self._is_closing.set()
        self._thread.join(PATIENCE)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not self._is_closing.wait(EVERY):
            while self._waiting:
                self._send()
        while self._waiting and self._send():
            pass

    def _send(self) -> bool:
        try:
            records = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            offset = time.time() - time.monotonic()
            spans = [span for record in records for span in _spans(record, offset, self._resource)]
            is_sent = self._exporter.export(spans).name == "SUCCESS"
        except Exception:  # whatever it is, the next ones are tried
            log.debug("traces could not be sent", exc_info=True)
            is_sent = False
        now = time.monotonic()
        if not is_sent and now - self._said >= SAID_AGAIN:
            self._said = now
            log.warning("the collector at %s takes no traces: they are dropped until it does", self._at)
        return is_sent


def _spans(record: Record, offset: float, resource: Any) -> "Iterator[ReadableSpan]":
    """The request's spans. `offset` turns loop times into seconds since 1970."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanKind, Status, StatusCode

    trace = record.trace
    assert trace is not None
    own = _context(trace, trace.span_id)
    scope = InstrumentationScope("groundserve")

    def nanoseconds(at: float) -> int:
        return int((at + offset) * 1e9)

    is_failed = record.status >= 500 or bool(record.error)
    yield ReadableSpan(
        f"{record.method} {record.path}",
        own,
        _context(trace, trace.parent_id, is_remote=True) if trace.parent_id else None,
        resource,
        _attributes(record),
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, record.error or None) if is_failed else Status(),
        start_time=nanoseconds(record.received_at),
        end_time=nanoseconds(record.received_at + record.duration),
        instrumentation_scope=scope,
    )
    for name, began, ended in _phases(record):
        yield ReadableSpan(
            name,
            _context(trace, drawn(64)),
            own,
            resource,
            start_time=nanoseconds(began),
            end_time=nanoseconds(ended),
            instrumentation_scope=scope,
        )


def _phases(record: Record) -> Iterator[tuple[str, float, float]]:
    """Name, beginning and end (loop times) of what the request went through, as far as it came."""
    if not record.sent_at:
        return
    connecting = record.sent_at - (record.connect or 0.0)
    if record.queued:
        yield "queue", max(connecting - record.queued, record.received_at), connecting
    if record.connect is not None:
        yield "connect", connecting, record.sent_at
    if record.first_byte is not None:
        began = max(record.received_at + record.first_byte, record.sent_at)
        yield "first byte", record.sent_at, began
        yield "answer", began, max(record.received_at + record.duration, began)


def _context(trace: Trace, span_id: int, is_remote: bool = False) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(trace.trace_id, span_id, is_remote, TraceFlags(TraceFlags.SAMPLED))


def _attributes(record: Record) -> dict[str, str | int | float]:
    """In OpenTelemetry's own words where it has some."""
    found: dict[str, str | int | float | None] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "http.response.status_code": None if record.status == CLIENT_LEFT else record.status,
        "error.type": "client_left" if record.status == CLIENT_LEFT else record.error or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.model": record.model or None,
        "groundserve.request_id": record.id,
        "groundserve.replica": record.member or None,
        "groundserve.reason": record.reason or None,
        "groundserve.attempts": record.attempts,
        "groundserve.retries": ",".join(record.retries) or None,
        "groundserve.key": record.key or None,
    }
    return {name: value for name, value in found.items() if value is not None}
