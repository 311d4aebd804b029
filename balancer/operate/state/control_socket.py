"""The control socket of a running controller: one JSON request per connection, answered in JSON lines.

A request is {"do": WORD, ...}. The answer is {"say": TEXT} any number of times while the controller works, then
{"done": VALUE} or {"error": TEXT}.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from balancer.errors import ConfigError

Say = Callable[[str], None]
Answer = Callable[[Mapping[str, Any], Say], Awaitable[Any]]

# Seconds that a request may take to arrive; clients write it at once.
_REQUEST_TIMEOUT = 10.0
# Seconds that answers may still take at the end; whoever asked for the end gets his at once.
_LAST_ANSWERS = 2.0
# Bytes; the largest request holds a service file.
_LINE_LIMIT = 4 << 20


class NotUp(Exception):
    """Nothing answers on the socket: the service is not up."""


@contextlib.asynccontextmanager
async def serving(path: Path, answer: Answer) -> AsyncIterator[None]:
    """Answers requests while the block runs. A ConfigError that `answer` raises becomes the client's error."""

    answering: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answering.add(task)
        task.add_done_callback(answering.discard)

        def send(message: Mapping[str, Any]) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        try:
            request = json.loads(await asyncio.wait_for(reader.readline(), _REQUEST_TIMEOUT))
            try:
                send({"done": await answer(request, lambda text: send({"say": text}))})
            except ConfigError as failure:
                send({"error": str(failure)})
            except Exception as failure:  # the service goes on, and the client is told
                send({"error": f"that failed: {type(failure).__name__}: {failure}"})
            await writer.drain()
        except (ValueError, ConnectionError, TimeoutError):
            pass  # not a request of ours, or the client has gone
        finally:
            writer.close()

    with _short(path) as short:
        server = await asyncio.start_unix_server(connected, short, limit=_LINE_LIMIT)
    try:
        yield
    finally:
        server.close()
        # The client that asked for the service to end still gets its answer; others must not keep the controller up.
        if left := set(answering):
            _, late = await asyncio.wait(left, timeout=_LAST_ANSWERS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


def ask(path: Path, request: Mapping[str, Any], say: Say | None = None, timeout: float | None = 10) -> Any:
    """Sends a request to the controller and returns its answer.

    `say` is called with each progress line; `timeout` is the longest silence allowed, in seconds. Raises NotUp, and
    ConfigError with the controller's own message.
    """
    try:
        with _short(path) as short, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            connection.connect(short)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    try:
                        message = json.loads(line)
                    except ValueError:
                        raise NotUp from None  # the controller ended in the middle of its answer
                    if "error" in message:
                        raise ConfigError(message["error"])
                    if "done" in message:
                        return message["done"]
                    if say is not None:
                        say(message["say"])
    except TimeoutError:
        raise ConfigError(f"{path.parent.name}: its controller does not answer; see {path.parent}") from None
    except OSError:
        raise NotUp from None
    raise NotUp


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same socket by a short path: the address of a unix socket is limited to 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
