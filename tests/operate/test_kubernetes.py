"""The Kubernetes engine as far as it can be told without a cluster; tests/e2e/kubernetes has a real one."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from balancer.operate.engines.kubernetes import engine, objects
from balancer.operate.engines.kubernetes.cluster import Cluster
from balancer.operate.engines.kubernetes.engine import KubernetesEngine
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.kubernetes import Kubernetes
from tests.support.until import until


def pod(name: str, **labels: str) -> dict[str, object]:
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app.kubernetes.io/component": "replica", **labels},
        },
        "spec": {"nodeName": "h1"},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }


OURS = pod("x-1", **{objects.ID: "1", objects.VERSION: "1", objects.DIGEST: "d"})


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubernetesEngine:
    """An engine whose kubectl prints the file `pods`."""
    (tmp_path / "kubectl").write_text(f'#!/bin/sh\ncase "$*" in *" get "*) cat {tmp_path}/pods;; esac\n')
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(engine, "_LOOK", 0.05)
    folder = ServiceFolder(tmp_path / "state", "x")
    folder.path.mkdir(parents=True)
    made = KubernetesEngine(folder)
    made._cluster = Cluster("x", Kubernetes(image="replica", balancer_image="balancer"))
    return made


def test_garbage_ends_nothing_and_is_outlived(made: KubernetesEngine, tmp_path: Path) -> None:
    """What kubectl prints is no answer until it can be read."""

    async def run() -> None:
        listed = tmp_path / "pods"
        listed.write_text(json.dumps({"items": [OURS, pod("stranger", **{objects.ID: "2"})]}))
        assert [survivor.id for survivor in await made.found()] == [1]
        for garbage in ("", "[]", '{"items": [{}]}', json.dumps({"items": [OURS | {"status": None}]})):
            listed.write_text(garbage)
            await until(lambda: "unknown whether it runs" in made.running()[1].reason)
            listed.write_text(json.dumps({"items": [OURS]}))
            await until(lambda: not made.running()[1].reason)
        assert made.ended() == ()
        listed.write_text('{"items": []}')
        await until(lambda: not made.running())
        assert "removed by somebody else" in made.ended()[0].reason
        await made.close()

    asyncio.run(run())
