"""One replica in virtual time: continuous batching over a finite KV pool with prefix reuse. No sockets, no clock.

The scheduler works in steps, as SGLang's does: a prefill step when a waiting request fits (running ones stand
still meanwhile), else a decode step that gives every running request one token. A prefill step lasts
`step_overhead + new tokens / prefill_rate`, a decode step `itl_base + itl_per_request x batch`, in seconds. Equal
decode steps are simulated together, so that the cost of a simulated request does not grow with its length.

The caller keeps the time: it calls `submit` and `abort` at some `now`, `next_time()` for when to come back, and
`advance(now)` to let everything happen that is due. `now` never decreases.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass
from itertools import count

from tests.lab.radix import TOKEN, RadixCache
from tests.lab.request import Request


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A replica's speed and size. The defaults are the order of magnitude of a 7B model on one 24 GB GPU."""

    prefill_rate: float = 8000.0  # tokens a second
    step_overhead: float = 0.005  # seconds a prefill step takes in addition to its tokens
    itl_base: float = 0.020  # seconds a decode step takes in addition to its batch
    itl_per_request: float = 0.0004  # seconds each request in the batch adds
    max_total_tokens: int = 60_000  # the KV pool
    page_size: int = 1  # tokens; prefixes are reused in whole pages
    max_running_requests: int = 64
    max_queued_requests: int | None = None  # None: no limit
    chunk_tokens: int = 4096  # the maximum number of new tokens in one prefill step
    reserve: float = 0.3  # share of the tokens that running requests may still make, kept free at admission
    image_tokens: int = 576  # tokens in an image: LLaVA-1.5's 24 x 24 patches

    def itl(self, batch: int) -> float:
        """Inter-token latency in seconds with `batch` requests running."""
        return self.itl_base + self.itl_per_request * batch


class QueueFull(Exception):
    """`max_queued_requests` are waiting already; SGLang answers 503."""


class TooLong(ValueError):
    """The prompt does not fit the KV pool; SGLang answers 400."""


class ReplicaModel:
    """The scheduler and the KV pool of one replica."""

    def __init__(self, settings: ModelSettings | None = None) -> None:
        self.settings = settings or ModelSettings()
        self.cache = RadixCache(self.settings.page_size)
        self.waiting: deque[Request] = deque()
        self.running: set[Request] = set()
        self.last_step_at = -math.inf  # when any output last left the scheduler
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0
        self.output_tokens_total = 0
        self.requests_total = 0
        self.aborted_total = 0
        self.retracted_total = 0
        self._page_bytes = self.settings.page_size * TOKEN
        self._numbers = count(1)
        self._order = count()
        self._private = 0  # tokens in the pool that are not in the tree
        self._steps = 0  # decode steps so far
        self._finishes: list[tuple[int, int, Request]] = []
        self._to_make = 0  # sum over running requests of finish_step
        self._prefilling: list[tuple[Request, int]] = []  # the prefill step in flight: requests, new tokens
        self._chunked: Request | None = None  # whose prompt is only partly computed
        self._began = 0.0  # start of the step in flight, or of the first of the decode steps simulated together
        self._step = 0.0  # seconds that each of them lasts
        self._count = 0  # how many they are; 0: idle
        self._blocked = False  # the first in the queue did not fit: only a finish changes that
        self._is_paused = False
        self._leaving: list[Request] = []  # aborted while in the pool: they leave at the next step
        self._over: list[Request] = []

    # Its state.

    @property
    def used_tokens(self) -> int:
        """Tokens of the pool that requests hold: what /v1/loads calls used."""
        return self._private + self.cache.held

    @property
    def free_tokens(self) -> int:
        """Tokens of the pool that are not in use."""
        return self.settings.max_total_tokens - self._private - self.cache.cached

    @property
    def is_idle(self) -> bool:
        return self._count == 0

    def made(self, request: Request) -> int:
        """Tokens that a request has made so far, as of the last `advance`."""
        if request in self.running:
            return request.made + self._steps - request.joined_step
        return request.made

    # Events from outside.

    def submit(self, request: Request, now: float) -> None:
        """A request arrives. Raises QueueFull, or TooLong."""
        settings = self.settings
        if request.prompt_tokens >= settings.max_total_tokens:
            raise TooLong(f"{request.prompt_tokens} tokens do not fit a pool of {settings.max_total_tokens}")
        self._run_until(now)
        if settings.max_queued_requests is not None and len(self.waiting) >= settings.max_queued_requests:
            raise QueueFull
        request.output_tokens = min(request.output_tokens, settings.max_total_tokens - request.prompt_tokens)
        request.arrived_at = now
        request.number = next(self._numbers)
        self.requests_total += 1
        self.waiting.append(request)
        if self._count == 0:
            self._schedule(now)
        elif not self._prefilling and not self._blocked:
            self._count = 1  # it is considered when the decode step in flight ends

    def abort(self, request: Request, now: float) -> None:
        """The request's client left: it leaves the queue at once, or the batch at the end of the step in flight."""
        self._run_until(now)
        if request.aborted or request.finished_at is not None:
            return
        request.aborted = True
        self.aborted_total += 1
        if request.node is None and request is not self._chunked:
            self.waiting.remove(request)
            request.finished_at = now
            self._over.append(request)
        else:
            self._leaving.append(request)
        if self._count and not self._prefilling:
            self._count = 1

    def next_time(self) -> float:
        """When `advance` next has something to do, for a caller that needs no single tokens; infinite when idle."""
        return self._began + self._step * self._count if self._count else math.inf

    def next_token_time(self) -> float:
        """When the step in flight ends; infinite when idle."""
        return self._began + self._step if self._count else math.inf

    def advance(self, now: float) -> list[Request]:
        """Let everything happen up to `now`. Returns the requests that finished or left since the last call."""
        self._run_until(now)
        over, self._over = self._over, []
        return over

    def pause(self, now: float) -> None:
        """The step in flight is lost, all requests go back to the queue in order, and the pool is emptied."""
        self._run_until(now)
        self._private -= sum(new for _, new in self._prefilling)
        there = {*self.running, *(request for request, _ in self._prefilling)}
        there |= {self._chunked} if self._chunked is not None else set()
        for request in sorted(there, key=lambda one: one.number, reverse=True):
            if request in self.running:
                self._stop_running(request)
                request.retractions += 1
                self.retracted_total += 1
            self._release(request)
            request.tokens = request.prompt + self._output(request, request.made)
            if request.aborted:
                request.finished_at = now
                self._over.append(request)
            else:
                self.waiting.appendleft(request)
        for request in self._leaving:
            if request in self.waiting:  # retracted before
                self.waiting.remove(request)
                request.finished_at = now
                self._over.append(request)
        self._leaving, self._prefilling, self._chunked, self._count = [], [], None, 0
        self.cache = RadixCache(self.settings.page_size)
        self._is_paused = True

    def go_on(self, now: float) -> None:
        self._is_paused = False
        if self.waiting:
            self._schedule(now)

    # One step after another.

    def _run_until(self, now: float) -> None:
        while self._count and self._began + self._step * self._count <= now:
            at = self._began + self._step * self._count
            if self._prefilling:
                self._end_prefill(at)
            else:
                self._end_decode(self._count, at)
            self._schedule(at)
        if self._count > 1 and self._began + self._step <= now:
            done = min(max(1, int((now - self._began) / self._step)), self._count - 1)
            self._began += done * self._step
            self._count -= done
            self._decode(done, self._began)

    def _schedule(self, at: float) -> None:
        if self._is_paused:
            return
        self._began = at
        self._prefilling = self._prefill_batch(at)
        settings = self.settings
        if self._prefilling:
            new = sum(tokens for _, tokens in self._prefilling)
            self._step = settings.step_overhead + new / settings.prefill_rate
            self._count = 1
            return
        while (room := self.free_tokens + self.cache.evictable) < len(self.running):
            self._retract(at)
        batch = len(self.running)
        if batch:
            self._step = settings.itl(batch)
            self._count = 1 if self._leaving else min(self._next_finish() - self._steps, room // batch)
        elif self.waiting:
            self._schedule(at)  # the last one running was too big for the pool and has ended
        else:
            self._count = 0

    def _next_finish(self) -> int:
        """The decode step after which the first running request is done."""
        finishes = self._finishes
        while finishes[0][2] not in self.running or finishes[0][2].finish_step != finishes[0][0]:
            heapq.heappop(finishes)
        return finishes[0][0]

    def _prefill_batch(self, at: float) -> list[tuple[Request, int]]:
        """Take waiting requests, and their tokens from the pool, while they fit; first come first served."""
        settings = self.settings
        budget = settings.chunk_tokens
        batch: list[tuple[Request, int]] = []
        to_make = self._to_make - self._steps * len(self.running)
        self._blocked = False
        if self._chunked is not None:
            new = min(budget, (len(self._chunked.tokens) - self._chunked.kept) // TOKEN - self._chunked.private)
            self._take(new)
            batch.append((self._chunked, new))
            budget -= new
        while self.waiting and budget:
            if len(self.running) + len(batch) >= settings.max_running_requests:
                self._blocked = True
                break
            request = self.waiting[0]
            total = len(request.tokens) // TOKEN
            node, cached = self.cache.hold(request.tokens[:-TOKEN])
            output = request.output_tokens - request.made
            wanted = total - cached + output + settings.reserve * to_make
            if wanted > self.free_tokens + self.cache.evictable and (self.running or batch):
                self.cache.let_go(node)
                self._blocked = True
                break
            self.waiting.popleft()
            new = min(budget, total - cached)
            self._take(new)
            budget -= new
            to_make += output
            request.node = node
            request.kept = cached * TOKEN
            if request.started_at is None:
                request.started_at = at
                request.cached_tokens = cached
                self.prompt_tokens_total += total
                self.cached_tokens_total += cached
            batch.append((request, new))
        return batch

    def _take(self, tokens: int) -> None:
        lacking = tokens - self.free_tokens
        if lacking > 0:
            self.cache.evict(lacking)
        self._private += tokens

    def _end_prefill(self, at: float) -> None:
        self.last_step_at = at
        batch, self._prefilling = self._prefilling, []
        self._chunked = None
        for request, new in batch:
            request.private += new
            computed = request.kept // TOKEN + request.private
            if computed * TOKEN < len(request.tokens):
                self._keep(request, request.tokens[: computed * TOKEN])
                self._chunked = request
                continue
            self._keep(request, request.tokens)
            request.made += 1
            self.output_tokens_total += 1
            if request.first_token_at is None:
                request.first_token_at = at
            if request.made == request.output_tokens:
                self._leave(request, at)
                continue
            self.running.add(request)
            request.joined_step = self._steps
            request.finish_step = self._steps + request.output_tokens - request.made
            self._to_make += request.finish_step
            heapq.heappush(self._finishes, (request.finish_step, next(self._order), request))
        self._drop_aborted(at)

    def _decode(self, steps: int, at: float) -> None:
        """Some equal decode steps are done: each gave every running request one more token."""
        self.last_step_at = at
        tokens = steps * len(self.running)
        self._steps += steps
        self.output_tokens_total += tokens
        self._take(tokens)

    def _end_decode(self, steps: int, at: float) -> None:
        self._decode(steps, at)
        finishes = self._finishes
        while finishes and finishes[0][0] <= self._steps:
            finish_step, _, request = heapq.heappop(finishes)
            if request in self.running and request.finish_step == finish_step:
                self._stop_running(request)
                self._leave(request, at)
        self._drop_aborted(at)

    def _drop_aborted(self, at: float) -> None:
        leaving, self._leaving = self._leaving, []
        for request in leaving:
            if request.finished_at is not None:
                continue
            if request in self.running:
                self._stop_running(request)
            elif request is self._chunked:
                self._chunked = None
            elif request.node is None:  # retracted meanwhile
                self.waiting.remove(request)
                request.finished_at = at
                self._over.append(request)
                continue
            self._leave(request, at)

    def _stop_running(self, request: Request) -> None:
        """Take a request out of the batch: what it made is counted, and still private."""
        done = self._steps - request.joined_step
        request.made += done
        request.private += done
        self._to_make -= request.finish_step
        self.running.discard(request)

    def _leave(self, request: Request, at: float) -> None:
        """The request finished or was aborted: its tokens go to the tree, except the last, which was never computed."""
        if request.made > 1:
            self._keep(request, request.prompt + self._output(request, request.made - 1))
        self._release(request)
        request.finished_at = at
        self._over.append(request)

    def _keep(self, request: Request, computed: bytes) -> None:
        """Move whole pages of computed tokens from the request's private ones to the tree, and lock them there."""
        node = request.node
        assert node is not None
        whole = len(computed) - len(computed) % self._page_bytes
        if whole > request.kept:
            request.node = self.cache.extend(node, computed[request.kept : whole])
            request.kept = whole
        rest = (len(computed) - whole) // TOKEN
        self._private -= request.private - rest
        request.private = rest

    def _release(self, request: Request) -> None:
        assert request.node is not None
        self.cache.let_go(request.node)
        request.node = None
        self._private -= request.private
        request.private = 0

    def _retract(self, at: float) -> None:
        """The pool is full: the request that made the fewest tokens goes back to the queue, to be prefilled again."""
        request = min(self.running, key=lambda one: (self.made(one), -one.number))
        self._stop_running(request)
        if len(self.running) == 0:
            request.output_tokens = request.made  # alone and still too big: it ends here
            self._leave(request, at)
            return
        made = self._output(request, request.made)
        self._keep(request, request.prompt + made[:-TOKEN])
        self._release(request)
        request.tokens = request.prompt + made
        request.retractions += 1
        self.retracted_total += 1
        self.waiting.appendleft(request)

    def _output(self, request: Request, tokens: int) -> bytes:
        if len(request.output) >= tokens * TOKEN:
            return request.output[: tokens * TOKEN]
        own = b"\xff" + request.number.to_bytes(TOKEN - 1, "big")
        return request.output + own * (tokens - len(request.output) // TOKEN)
