"""Our plug-in for SGLang: a drain that loses no request, what a plain CPU lacks, restrictions on media.

SGLang imports it through its entry points in each of its processes, before torch: heavy modules are imported only where
they are used.
"""

import asyncio
import contextlib
import hmac
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from replica import scratch
from replica.command import KEY_FILE_MARK, PLUGIN_MARK, VARIABLE
from replica.options import OptionsError, read_secret

# 0 switches our attention hook off; a CPU replica then uses SGLang's own attention, much slower on a cached prefix.
ATTENTION_HOOK = "REPLICA_CPU_ATTENTION_HOOK"

DRAIN_GRACE = 5.0  # seconds that a replica serves as usual after its /ready has turned 503
_HUNG = 60.0  # seconds without a token after which an unhealthy server is considered hung
_TICK = 0.1

# Functions that SGLang 0.5.19, the last for CUDA 12, does not have. Without the first it logs its keys, so it may have
# none; without the second a refused image of a stream is told as an event instead of a 400.
_LISTING_FOR_LOG = "sglang.srt.entrypoints.engine._server_args_for_logging"
_MAY_LACK = (_LISTING_FOR_LOG, "sglang.srt.entrypoints.http_server.serve_generate_request")
_KEY_FLAGS = ("--api-key", "--admin-api-key")

_kept: list[object] = []  # a torch.library.Library undoes its definitions when it is garbage-collected


def activate() -> None:
    """SGLang's platform entry point: supplies what a CPU lacks. Selects no platform, so SGLang detects its own."""
    if _on_cpu():
        provide_sgl_kernel()
        declare_torchvision_ops()


def register_hooks() -> None:
    """SGLang's plug-in entry point. Ends the process if a hook cannot be installed, which SGLang would only log."""
    from replica import media_hooks, tenant_hooks

    try:
        hooks = {**media_hooks.around(os.environ), **tenant_hooks.around(os.environ)}
        sys.argv[:] = fill_in_key((part for part in sys.argv if part != PLUGIN_MARK), os.environ)
    except (ValueError, OptionsError) as error:
        sys.exit(f"replica: {error}")
    end_forks_with_parent()
    hooks["sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog"] = drain
    hooks[_LISTING_FOR_LOG] = mask_keys
    hooks["sglang.srt.managers.load_snapshot.shm_path_for"] = remember_shared_memory
    hooks["sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription.handle_websocket"] = (
        ask_for_key
    )
    if _on_cpu():
        hooks["sglang.srt.models.llava.LlavaBaseForCausalLM.encode_images"] = encode_as_projected
        if os.environ.get(ATTENTION_HOOK, "1") != "0":
            hooks[
                "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend"
            ] = extend_new_rows
    lacking = {target for target in _MAY_LACK if _is_lacking(target)}
    if _LISTING_FOR_LOG in lacking and any(part.split("=", 1)[0] in _KEY_FLAGS for part in sys.argv):
        sys.exit("replica: this SGLang would write its key into its log, so it gets none: SGLang 0.5.23 is needed")
    hook({target: around for target, around in hooks.items() if target not in lacking})


def hook(hooks: Mapping[str, Callable[..., Any]]) -> None:
    """Wraps each named function in its hook, at once; ends the process if a function does not exist.

    A replica without its hooks would let clients read its files, log its keys, or cut off answers when it stops.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    stock = {target: _found(target) for target in hooks}
    for target, around in hooks.items():
        HookRegistry.register(target, around, HookType.AROUND)
    HookRegistry.apply_hooks()
    for target in hooks:
        if _found(target) is stock[target]:
            if broken := _broken_import(target):
                sys.exit(f"replica: SGLang cannot be imported: {broken}")
            sys.exit(
                f"replica: this SGLang has no {target} to hold on to, so it is not served: SGLang 0.5.23 is needed"
            )


def _found(target: str) -> object:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError):
        return None


def _is_lacking(target: str) -> bool:
    """Does the function's module work, and has no such function?"""
    return _found(target) is None and not _broken_import(target)


def _broken_import(target: str) -> str:
    """What keeps the function's module from being imported, such as a package that is missing; empty if nothing does.

    pkgutil reports only that the module's package lacks such an attribute.
    """
    module = target
    while module := module.rpartition(".")[0]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{target}.".startswith(f"{error.name}."):
                return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        else:
            return ""
    return ""


def _on_cpu() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def end_forks_with_parent() -> None:
    """Makes each process that this one forks exit within a second after this one has ended.

    SGLang forks workers for images at the first request with images, and nothing ends them when the main process is
    killed: they would keep its port open and its GPU lease locked for ever. Its other children exit by themselves.
    A thread polls for this, because the kernel's way (PR_SET_PDEATHSIG) ends a child with the thread that forked it.
    """
    parent = 0

    def remember() -> None:
        nonlocal parent
        parent = os.getpid()

    def watch(mine: int) -> None:
        while os.getppid() == mine:
            time.sleep(0.5)
        os._exit(1)

    def start() -> None:
        # Passed as an argument: a child that forks in turn overwrites its own `parent`.
        threading.Thread(target=watch, args=(parent,), name="ends with its parent", daemon=True).start()

    os.register_at_fork(before=remember, after_in_child=start)


def fill_in_key(argv: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """argv with `@file:PATH` after --api-key replaced by the file's content, and `@env:NAME` by the variable's.

    Only variables that are made for that are read. Raises OptionsError.
    """
    made: list[str] = []
    for part in argv:
        flag, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
        before = made[-1] if made and not flag else ""
        if before == "--api-key" and part.startswith(KEY_FILE_MARK):
            secret = read_secret(Path(part.removeprefix(KEY_FILE_MARK)), "SGLANG_API_KEY_FILE")
        elif found := VARIABLE.fullmatch(value):
            if found[1] not in environ:
                raise OptionsError(f"{found[1]}, which {flag or before} wants, is not set")
            secret = environ[found[1]]
        else:
            made.append(part)
            continue
        if before.startswith("--") and "=" not in before:
            # As one argument: a key that begins with a hyphen would be read as a flag.
            flag, equals = made.pop(), "="
        made.append(f"{flag}{equals}{secret}")
    return made


def mask_keys(stock: Callable[..., dict[str, Any]], *more: Any) -> dict[str, Any]:
    """Wraps SGLang's listing of its arguments for the log, which would show its keys in clear text."""
    return {
        name: "***" if value and re.search(r"(api_key|password)$", name) else value
        for name, value in stock(*more).items()
    }


async def ask_for_key(stock: Callable[[Any, Any], Awaitable[None]], serving: Any, websocket: Any) -> None:
    """Wraps /v1/realtime: SGLang asks for its API key on HTTP requests, and lets every WebSocket in."""
    key = serving.tokenizer_manager.server_args.api_key
    given = websocket.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        await websocket.close(1008)  # before it is open: its client gets a 403
        return
    await stock(serving, websocket)


def remember_shared_memory(stock: Callable[[str], str], name: str) -> str:
    """Wraps the naming of a shared memory file, which SGLang never removes: it goes with the scratch folder."""
    path = stock(name)
    folder = Path(os.environ.get("TMPDIR", "/"))
    if folder.name.startswith(scratch.PREFIX):
        with contextlib.suppress(OSError):  # another process has named the file before, and made the link
            (folder / f"{scratch.ELSEWHERE}{Path(path).name}").symlink_to(path)
    return path


class Server(Protocol):
    """The part of SGLang's TokenizerManager that the drain uses."""

    gracefully_exit: bool  # set by SIGTERM; /ready answers 503 from then on
    server_status: Any
    rid_to_state: dict[str, Any]  # requests in flight
    last_receive_tstamp: float  # when a token last came, seconds since the epoch


async def drain(
    stock: Callable[[Server], Awaitable[None]],
    server: Server,
    grace: float = DRAIN_GRACE,
    hung: float = _HUNG,
) -> None:
    """Wraps TokenizerManager.sigterm_watchdog, which ends the server after SIGTERM.

    The stock watchdog checks every 5 s and ends an idle server at that check, even a moment after SIGTERM, which resets
    clients that have not yet seen /ready change. After a failed /health it ends the server at once, whatever is in
    flight. Here the server goes on for `grace` seconds, then until nothing is in flight, and then the stock watchdog
    ends it. A server that failed its /health is not waited for once it has made no token for `hung` seconds.
    """
    while not server.gracefully_exit:  # noqa: ASYNC110 - SGLang has a flag, not an event
        await asyncio.sleep(_TICK)
    status = type(server.server_status)
    if server.server_status is not status.Starting:
        began = time.time()
        await asyncio.sleep(grace)
        while server.rid_to_state:
            if server.server_status is status.UnHealthy and time.time() - max(began, server.last_receive_tstamp) > hung:
                break
            await asyncio.sleep(_TICK)
        else:
            await asyncio.sleep(_TICK)  # the stock watchdog blocks the event loop: send the last answers first
            server.server_status = status.Up  # all is answered: no need for the stock watchdog to exit early
    await stock(server)


def provide_sgl_kernel() -> None:
    """Installs a stand-in for sgl_kernel, which has no CPU wheel but is always imported.

    SGLang on a CPU imports only its functions for speculative decoding and KV moves, which a plain CPU does not do.
    """
    if importlib.util.find_spec("sgl_kernel") is not None:
        return

    def missing(name: str) -> Callable[..., object]:
        if not name.endswith("_cpu"):
            raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")

        def function(*_: object, **__: object) -> object:
            raise NotImplementedError(f"sgl_kernel.{name}: this SGLang runs on a CPU without the compiled sgl_kernel")

        return function

    module = types.ModuleType("sgl_kernel", "groundserve's stand-in on a plain CPU.")
    module.__spec__ = importlib.util.spec_from_loader("sgl_kernel", loader=None)
    module.__dict__["__getattr__"] = missing
    sys.modules["sgl_kernel"] = module


def declare_torchvision_ops() -> None:
    """Declares two operators that a torchvision built for CUDA needs beside a torch built for CPUs.

    Its compiled operators cannot be loaded there. It tolerates that, but still registers fake kernels for these two.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _kept:
        return
    import torch

    library = Path(spec.origin).with_name("_C.so")
    if library.exists():
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            pass
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(operators)


def encode_as_projected(stock: Callable[[Any, Any], Any], model: Any, pixel_values: Any) -> Any:
    """Wraps LlavaBaseForCausalLM.encode_images: the vision tower computes in the projector's dtype.

    SGLang loads a tower and its pixels as float16 whatever --dtype says, and then fails at the projector.
    """
    dtype = next(model.multi_modal_projector.parameters()).dtype
    model.vision_tower.to(dtype)  # does nothing from the second call on
    return stock(model, pixel_values.to(dtype))


def extend_new_rows(
    stock: Callable[..., Any],
    backend: Any,
    query: Any,
    output: Any,
    k_cache: Any,
    v_cache: Any,
    req_to_token: Any,
    req_pool_indices: Any,
    seq_lens: Any,
    extend_prefix_lens: Any,
    extend_seq_lens: Any,
    encoder_lens: Any = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> Any:
    """Wraps TorchNativeAttnBackend._run_sdpa_forward_extend: computes attention for the new tokens' rows only.

    The stock function also computes the prefix's rows and throws them away, so a cached prefix saves the MLPs but not
    the quadratic part. query, output: [new tokens, heads, head size]; k_cache, v_cache: [slots, KV heads, head size].
    Anything but plain causal self-attention is left to the stock function.
    """
    windowed = sliding_window_size is not None and sliding_window_size > -1
    if encoder_lens is not None or is_cross_attn or windowed or not causal:
        return stock(
            *(backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens),
            *(extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal),
            *(is_cross_attn, sliding_window_size),
        )
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    start = 0
    rows = zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
    for row, total, new in rows:
        slots = req_to_token[row, :total]
        mask = None
        if 1 < new < total:  # a single row sees everything; a whole sequence is the plain causal case
            mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        attended = scaled_dot_product_attention(
            query[start : start + new].transpose(0, 1).unsqueeze(0),
            k_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
            v_cache[slots].transpose(0, 1).unsqueeze(0).to(query.dtype),
            attn_mask=mask,
            enable_gqa=enable_gqa,
            scale=scaling,
            is_causal=new == total,
        )
        output[start : start + new] = attended.squeeze(0).transpose(0, 1)
        start += new
    return output
