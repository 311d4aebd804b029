"""A short form of `python -m tests.chaos --tenants`."""

import uvloop

from tests.chaos.tenants import play

STEPS = 40


def test_models_that_share_a_gpu_keep_every_promise() -> None:
    report = uvloop.run(play(3, STEPS, lambda *_: None))
    assert report.steps.total() == STEPS
    assert report.ends["whole 200"] > STEPS
