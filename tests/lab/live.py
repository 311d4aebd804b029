"""The model of tests/lab/model.py, run by an event loop's clock: it decides when tokens come in faithful mode."""

import asyncio
import math

from tests.lab.answers import words
from tests.lab.asked import Asked, BadRequest
from tests.lab.knobs import Knobs
from tests.lab.model import ModelSettings, ReplicaModel, TooLong
from tests.lab.prompts import image_tokens, prompt_tokens
from tests.lab.request import Request
from tests.lab.service import Load

HEALTH_LOOK = 1.0  # seconds between the checks of /health for any new output


class LivePace:
    """One generation in the model."""

    def __init__(self, live: "LiveModel", request: Request) -> None:
        self._live = live
        self.request = request
        self._made = 0
        self._news: asyncio.Future[None] | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.request.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self.request.cached_tokens

    async def token(self, position: int) -> None:
        while self._made <= position:
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    def abort(self) -> bool:
        return self._live.abort(self)

    def has_made(self, tokens: int) -> None:
        if tokens > self._made:
            self._made = tokens
            if self._news is not None and not self._news.done():
                self._news.set_result(None)


class LiveModel:
    """A ReplicaModel whose steps end by the loop's clock."""

    def __init__(self, settings: ModelSettings) -> None:
        self.model = ReplicaModel(settings)
        self.is_healthy = True  # what the last /health found
        self._paces: set[LivePace] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._stuck = False

    def pace(self, _: Knobs, asked: Asked) -> LivePace:
        """Start a generation. Raises QueueFull, or BadRequest for a prompt that cannot be served."""
        prompt = prompt_tokens(asked, self.model.settings.image_tokens)
        try:
            return self._submit(Request(prompt, asked.tokens, "".join(words(asked.tokens, asked.begin)).encode()))
        except TooLong as error:
            raise BadRequest(str(error)) from None

    def _submit(self, request: Request) -> LivePace:
        self.model.submit(request, self._now())
        pace = LivePace(self, request)
        self._paces.add(pace)
        self._arm()
        return pace

    def abort(self, pace: LivePace) -> bool:
        was_open = pace in self._paces
        self._paces.discard(pace)
        if was_open and not self._stuck:
            self.model.abort(pace.request, self._now())
            self._arm()
        return was_open

    def stick(self, stuck: bool) -> None:
        """Hang the scheduler, or let it continue."""
        self._stuck = stuck
        self._arm()

    def pause(self) -> None:
        """Stops the scheduler, its running requests back in the queue, and empties its cache."""
        self._step()
        self.model.pause(self._now())
        self._arm()

    def go_on(self) -> None:
        self.model.go_on(self._now())
        self._arm()

    async def check_health(self, timeout: float) -> bool:
        """As /health does, generates a token and checks each second for any output. Sets `is_healthy`."""
        began = self._now()
        pace = self._submit(Request(image_tokens("health", 1), 1))
        try:
            while self._now() < began + timeout:
                await asyncio.sleep(HEALTH_LOOK)
                if self.model.last_step_at > began:
                    self.is_healthy = True
                    return True
        finally:
            pace.abort()
        self.is_healthy = False
        return False

    def load(self) -> Load:
        model = self.model
        running = len(model.running)
        return Load(
            running=running,
            waiting=len(model.waiting),
            used_tokens=model.used_tokens,
            total_tokens=model.settings.max_total_tokens,
            max_running=model.settings.max_running_requests,
            gen_throughput=running / model.settings.itl(running) if running else 0.0,
            cache_hit_rate=model.cached_tokens_total / max(1, model.prompt_tokens_total),
        )

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _arm(self) -> None:
        self.close()
        due = self.model.next_token_time()
        if due < math.inf and not self._stuck:
            self._timer = asyncio.get_running_loop().call_at(due, self._step)

    def _step(self) -> None:
        over = set(self.model.advance(self._now()))
        for pace in list(self._paces):
            pace.has_made(self.model.made(pace.request))
            if pace.request in over:
                self._paces.discard(pace)
        self._arm()
