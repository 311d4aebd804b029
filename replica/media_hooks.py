"""Applies replica/media.py's policy wherever SGLang takes a client's string for a file or a URL."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from replica import fetch
from replica.media import MediaError, MediaPolicy

_COMMON = "sglang.srt.utils.common"
_FIELDS = ("image_data", "video_data", "audio_data")


def around(environ: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The wrappers for SGLang's functions, by full name.

    Requests are checked as they arrive, before any model's own media code sees them. The common loaders are wrapped as
    well, for code that loads media outside requests. Raises ValueError.
    """
    policy = MediaPolicy.read(environ)
    load = functools.partial(_load, policy)
    return {
        "sglang.srt.managers.io_struct.GenerateReqInput.__init__": functools.partial(_make, policy),
        "sglang.srt.entrypoints.http_server.serve_generate_request": functools.partial(_serve, policy),
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": functools.partial(_admit, policy),
        f"{_COMMON}.get_image_bytes": load,
        f"{_COMMON}.load_audio": load,
        f"{_COMMON}._normalize_video_input": load,
        f"{_COMMON}._load_image": _decode,
        f"{_COMMON}.get_mm_http_session": functools.partial(_session, policy),
        f"{_COMMON}.download_remote_media": fetch.fetch,
    }


def _settle(policy: MediaPolicy, asked: Any) -> None:
    for name in _FIELDS:
        if given := getattr(asked, name, None):
            setattr(asked, name, policy.settle_all(given))


def _make(policy: MediaPolicy, stock: Callable[..., None], asked: Any, *more: Any, **named: Any) -> None:
    """Wraps the request that every OpenAI or Anthropic request becomes: here a stream can still be refused with 400."""
    stock(asked, *more, **named)
    _settle(policy, asked)


async def _serve(
    policy: MediaPolicy, stock: Callable[..., Awaitable[Any]], asked: Any, *more: Any, **named: Any
) -> Any:
    """Wraps /generate, which builds its request directly from the body and starts a stream before it looks at it."""
    try:
        _settle(policy, asked)
    except MediaError as error:
        from fastapi.responses import JSONResponse

        return JSONResponse({"error": {"message": str(error)}}, 400)
    return await stock(asked, *more, **named)


def _admit(policy: MediaPolicy, stock: Callable[..., Any], manager: Any, asked: Any, *more: Any, **named: Any) -> Any:
    """Wraps the entry point of all requests, including embeddings and scores."""
    try:
        _settle(policy, asked)
    except MediaError as error:
        return _refuse(error)  # raised at the first read of the answer, like SGLang's own refusals
    return stock(manager, asked, *more, **named)


async def _refuse(error: MediaError) -> AsyncIterator[Any]:
    nothing: tuple[Any, ...] = ()
    for answer in nothing:  # makes it a generator
        yield answer
    raise error


def _load(policy: MediaPolicy, stock: Callable[..., Any], source: Any, *more: Any, **named: Any) -> Any:
    return stock(policy.settle(source) if isinstance(source, str) else source, *more, **named)


def _decode(stock: Callable[..., Any], *more: Any, **named: Any) -> Any:
    """Wraps image decoding: an image that Pillow cannot decode is the client's mistake, whatever Pillow raises."""
    try:
        return stock(*more, **named)
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise MediaError(f"Could not decode image: {error}") from error


def _session(policy: MediaPolicy, stock: Callable[..., Any]) -> Any:
    return fetch.guarded(stock(), policy)
