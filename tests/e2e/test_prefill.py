"""A long prefill on a real replica: SGLang is busy for seconds without a byte, and stays in service."""

import threading
import time

import httpx

from tests.e2e.running import Balancer


def test_a_long_prefill_takes_no_replica_out(balancer: Balancer) -> None:
    # For each replica a prompt of some 3,800 tokens, five a number; they share no prefix.
    prompts = ["".join(f" {start + n}" for n in range(760)) for start in (1000, 3000)]
    statuses: list[int] = []

    def ask(prompt: str) -> None:
        body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        statuses.append(httpx.post(f"{balancer.url}/generate", json=body, timeout=300).status_code)

    askers = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    began = time.monotonic()
    for asker in askers:
        asker.start()
    seen = set()
    while any(asker.is_alive() for asker in askers):
        seen.update(balancer.statuses())
        time.sleep(0.2)
    took = time.monotonic() - began
    for asker in askers:
        asker.join()
    assert statuses == [200, 200]
    assert took > 2, "the prefill was too short to show anything"
    assert seen == {"READY"}
