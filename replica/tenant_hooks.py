"""Installs a tenant in SGLang: pause and release, our routes in front of SGLang's, and fixes for two gaps.

The tenant itself runs in the main process; the schedulers only get what keeps a release from killing them. Checked
against SGLang 0.5.23: managers/scheduler.py and managers/scheduler_components/weight_updater.py.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from replica import nvml, sharing
from replica.tenant import Limits, Tenant
from replica.tenant_api import Alive, Gate
from replica.turn import HELD, Turn

GPU_SLICE = "GPU_SLICE"
# Seconds. A pause waits for the current forward pass: with a long prompt many seconds on a CPU, under one on a GPU.
_ON_CPU = 60.0
_GRAMMARS = 3.0  # seconds to wait for grammars to be compiled once generation is paused
_HEALTH_CHECK = "HEALTH_CHECK"  # how the ids of SGLang's own requests begin

_kept: list[Tenant] = []


def around(environ: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The hooks of a replica that shares its GPUs; empty for any other."""
    if HELD not in environ:
        return {}
    hooks: dict[str, Callable[..., Any]] = {
        "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine": rest_while_paused,
        "sglang.srt.managers.scheduler.Scheduler.flush_cache": settle_before_flush,
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".release_memory_occupation": settle_before_release,
    }
    if multiprocessing.parent_process() is None:
        hooks["sglang.srt.entrypoints.http_server._setup_and_run_http_server"] = serve_as_tenant
    return hooks


def serve_as_tenant(stock: Callable[..., Any], server_args: Any, manager: Any, *more: Any, **named: Any) -> Any:
    """Wraps the start of SGLang's HTTP server, in the process that holds the locks."""
    from sglang.srt.entrypoints import http_server

    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    slow = {"give_back": _ON_CPU, "take_back": _ON_CPU} if on_cpu else {}
    gpu_slice, share = float(os.environ.get(GPU_SLICE) or Limits.gpu_slice), int(os.environ.get(sharing.SHARE) or 0)
    limits = Limits(gpu_slice=gpu_slice, share=share, **slow)
    tenant = Tenant(Turn.inherit(os.environ), Server(manager), limits)
    _kept.append(tenant)
    # SGLang will wrap its check of the key around the middleware added so far; /alive has to come before that check.
    http_server.app.add_middleware(Gate, tenant=tenant)
    build = http_server.app.build_middleware_stack
    http_server.app.build_middleware_stack = lambda: Alive(build(), tenant)
    return stock(server_args, manager, *more, **named)


class Server:
    """SGLang's TokenizerManager as the engine of a tenant."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def has_started(self) -> bool:
        return bool(self._manager.server_status is not type(self._manager.server_status).Starting)

    def is_leaving(self) -> bool:
        return bool(self._manager.gracefully_exit)

    def requests(self) -> int:
        return sum(not str(rid).startswith(_HEALTH_CHECK) for rid in self._manager.rid_to_state)

    async def pause(self) -> bool:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        await self._manager.pause_generation(PauseGenerationReqInput(mode="retract"))
        # A flush is refused while anything runs; a release would kill the scheduler then.
        return bool((await self._manager.flush_cache()).success)

    async def release(self, what: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=list(what)))

    async def resume(self, what: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(what)))

    async def go_on(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self._manager.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
        # A health check that a doze interrupted has failed through no fault of the server.
        status = type(self._manager.server_status)
        if self._manager.server_status is status.UnHealthy:
            self._manager.server_status = status.Up

    def free_memory(self, gpu: str) -> int | None:
        return nvml.free_memory(gpu)

    def die(self) -> None:
        from sglang.srt.utils import kill_process_tree

        # First the processes that hold the memory: the turn is free as soon as this process ends.
        kill_process_tree(os.getpid(), include_parent=False)
        os.kill(os.getpid(), signal.SIGKILL)


def rest_while_paused(stock: Callable[[Any], None], scheduler: Any) -> None:
    """Wraps what a paused scheduler does in each iteration, which by itself would keep a core busy."""
    stock(scheduler)
    if scheduler.idle_sleeper is not None:
        scheduler.idle_sleeper.maybe_sleep()  # until a message arrives, at most a second


def settle_before_flush(stock: Callable[..., bool], scheduler: Any, *more: Any, **named: Any) -> bool:
    """Wraps Scheduler.flush_cache, which a tenant calls to learn whether anything still runs."""
    _settle(scheduler)
    return stock(scheduler, *more, **named)


def settle_before_release(stock: Callable[[Any, Any], Any], updater: Any, request: Any) -> Any:
    """Wraps the release itself: another request may have arrived since that flush."""
    _settle(updater.scheduler)
    return stock(updater, request)


def _settle(scheduler: Any) -> None:
    """Moves requests whose grammar is being compiled into the queue: SGLang counts them as running.

    SGLang does so by itself only while it is not paused.
    """
    if scheduler is None or not scheduler._engine_paused:
        return
    give_up = time.monotonic() + _GRAMMARS
    while scheduler.grammar_manager.grammar_queue and time.monotonic() < give_up:
        for request in scheduler.grammar_manager.get_ready_grammar_requests():
            scheduler._add_request_to_queue(request)
