"""Clients that stream one answer after the other while a service changes, and what they saw."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.until import wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Streams:
    """`failed` has a line for each answer that was not whole, `replicas` the name of who gave each that was."""

    def __init__(self) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self.replicas: list[str] = []


@contextmanager
def streaming(endpoint: str, clients: int = 4, body: Mapping[str, Any] = CHAT) -> Iterator[Streams]:
    """Runs them meanwhile; each has had an answer before and has one after."""
    seen, is_over = Streams(), threading.Event()
    url = f"{endpoint}/v1/chat/completions"

    def client() -> None:
        with httpx.Client(timeout=60) as http:
            while not is_over.is_set():
                try:
                    with http.stream("POST", url, json=body) as answer:
                        lines = list(answer.iter_lines())
                    if answer.status_code == 200 and "data: [DONE]" in lines:
                        seen.answered += 1
                        seen.replicas.append(answer.headers["x-replica-id"])
                    else:
                        seen.failed.append(f"{answer.status_code} {lines[-2:]}")
                except httpx.HTTPError as failure:
                    seen.failed.append(repr(failure))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: seen.answered, fits=lambda count: count > clients)
        yield seen
        before = seen.answered
        wait_until(lambda: seen.answered, fits=lambda count: count > before + clients)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
