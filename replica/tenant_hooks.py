"""Puts a tenant into SGLang: what pauses and releases it, what answers in front of its routes, two gaps mended.

In the main process the tenant itself; in the schedulers only what keeps a release from killing them. Read against
SGLang 0.5.23: managers/scheduler.py and managers/scheduler_components/weight_updater.py.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from replica import nvml
from replica.tenant import Limits, Tenant
from replica.tenant_api import Alive, Gate
from replica.turn import HELD, Turn

GPU_SLICE = "GPU_SLICE"
# A pass over a long prompt, which a pause waits for, takes many seconds on a CPU and less than one on a GPU.
_ON_CPU = 60.0
_GRAMMARS = 3.0  # seconds that grammars may take until they are compiled, once generation is paused
_HEALTH_CHECK = "HEALTH_CHECK"  # how the names of SGLang's own requests begin

_kept: list[Tenant] = []


def around(environ: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The hooks of a replica that shares; none for any other."""
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
    """Around the start of SGLang's HTTP server, in the process that holds the locks."""
    from sglang.srt.entrypoints import http_server

    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    slow = {"give_back": _ON_CPU, "take_back": _ON_CPU} if on_cpu else {}
    limits = Limits(gpu_slice=float(os.environ.get(GPU_SLICE) or Limits.gpu_slice), **slow)
    tenant = Tenant(Turn.inherit(os.environ), Server(manager), limits)
    _kept.append(tenant)
    # SGLang puts its question for a key around what is there by now; /alive has to stand before that.
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
        # It refuses while anything runs, where a release would kill the scheduler.
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
        # A health check that a doze came upon has failed for no fault of the server's.
        status = type(self._manager.server_status)
        if self._manager.server_status is status.UnHealthy:
            self._manager.server_status = status.Up

    def free_memory(self, gpu: str) -> int | None:
        return nvml.free_memory(gpu)

    def die(self) -> None:
        from sglang.srt.utils import kill_process_tree

        # Those first that have the memory: the turn is free as soon as this process is gone.
        kill_process_tree(os.getpid(), include_parent=False)
        os.kill(os.getpid(), signal.SIGKILL)


def rest_while_paused(stock: Callable[[Any], None], scheduler: Any) -> None:
    """Around what a scheduler does in each round while it is paused: SGLang's would keep a core busy with it."""
    stock(scheduler)
    if scheduler.idle_sleeper is not None:
        scheduler.idle_sleeper.maybe_sleep()  # until a message comes, a second at the most


def settle_before_flush(stock: Callable[..., bool], scheduler: Any, *more: Any, **named: Any) -> bool:
    """Around Scheduler.flush_cache, which a tenant calls to learn whether all is still."""
    _settle(scheduler)
    return stock(scheduler, *more, **named)


def settle_before_release(stock: Callable[[Any, Any], Any], updater: Any, request: Any) -> Any:
    """Around the release itself: between that flush and this another request may have come."""
    _settle(updater.scheduler)
    return stock(updater, request)


def _settle(scheduler: Any) -> None:
    """Brings requests whose grammar is being compiled into the queue: SGLang takes them for running ones.

    They come to that by themselves only while it is not paused.
    """
    if scheduler is None or not scheduler._engine_paused:
        return
    give_up = time.monotonic() + _GRAMMARS
    while scheduler.grammar_manager.grammar_queue and time.monotonic() < give_up:
        for request in scheduler.grammar_manager.get_ready_grammar_requests():
            scheduler._add_request_to_queue(request)
