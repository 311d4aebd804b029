"""One namespace of a cluster, driven as a person would: with kubectl, in the cluster and outside of it."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from balancer.errors import ConfigError
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.kubernetes.objects import Object, everything_of
from balancer.operate.engines.typed import last_line, typed
from balancer.spec.kubernetes import Kubernetes

# Seconds that the API server gets to answer a question, and kubectl beyond that. Then it is silent.
ANSWER = 10.0
_MARGIN = 10.0
# Seconds that a service gets to be removed.
_REMOVAL = 180.0
_SILENT = f"Kubernetes does not answer within {ANSWER:.0f} s"
# What a container waits for that is being started.
_STARTING = ("ContainerCreating", "PodInitializing")
_LABEL = "app.kubernetes.io/component"
# All that a service consists of; those that others own go with them.
_KINDS = "deployment,service,poddisruptionbudget,rolebinding,role,serviceaccount,secret,configmap,pod"


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod according to the API. `age` is in seconds; `ends_in`, too, of a pod that was told to end."""

    name: str
    component: str
    labels: Mapping[str, str]
    phase: str
    # Its address and its node; empty while it has none.
    address: str
    node: str
    # Why it does not run yet, in Kubernetes' words; empty if there is nothing to say.
    reason: str
    age: float
    ends_in: float | None
    # Does its node no longer say how it is?
    is_cut_off: bool
    # How its container ended: exit code, and its last words. The code is None while it has not.
    exit_code: int | None
    last_words: str
    restarts: int

    @property
    def is_over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Pod":
        metadata, status = facts["metadata"], facts.get("status", {})
        conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
        container: Mapping[str, Any] = next(iter(status.get("containerStatuses", ())), {})
        state = container.get("state", {})
        ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
        waiting = state.get("waiting") or {}
        scheduled = conditions.get("PodScheduled", {})
        reason = ""
        if scheduled.get("status") == "False":
            reason = scheduled.get("message") or scheduled.get("reason", "")
        elif waiting.get("reason") not in (None, *_STARTING):
            reason = ": ".join(filter(None, (waiting.get("reason", ""), waiting.get("message", ""))))
        over = ": ".join(filter(None, (status.get("reason", ""), status.get("message", ""))))
        now = datetime.now(UTC)
        deleted = metadata.get("deletionTimestamp")
        return cls(
            metadata["name"],
            metadata["labels"].get(_LABEL, ""),
            metadata["labels"],
            status.get("phase", "Pending"),
            status.get("podIP", ""),
            facts["spec"].get("nodeName", ""),
            " ".join(reason.split()),
            max(0.0, (now - _time(metadata["creationTimestamp"])).total_seconds()),
            max(0.0, (_time(deleted) - now).total_seconds()) if deleted else None,
            # The control plane says so of a pod whose node is silent; no probe of ours makes a pod not ready.
            conditions.get("Ready", {}).get("status") in ("False", "Unknown")
            and conditions.get("ContainersReady", {}).get("status") == "True",
            ended.get("exitCode"),
            _last_word(ended.get("message") or "") or over,
            container.get("restartCount", 0),
        )


class Cluster:
    """The namespace of one service."""

    def __init__(self, name: str, section: Kubernetes) -> None:
        self._name = name
        self._section = section

    def command(self, *arguments: str) -> list[str]:
        """What to type."""
        context = ["--context", self._section.context] if self._section.context is not None else []
        return ["kubectl", *context, "--namespace", self._section.namespace, *arguments]

    def is_where(self, section: Kubernetes) -> bool:
        """Does this section mean our namespace, in our cluster?"""
        return (section.namespace, section.context) == (self._section.namespace, self._section.context)

    async def pods(self) -> list[Pod]:
        """All pods of the service. Raises CannotStart if the API server does not say."""
        said = await self._answered("get", "pods", "-l", everything_of(self._name), "-o", "json")
        try:
            return [Pod.of(facts) for facts in json.loads(said)["items"]]
        except (ValueError, LookupError, TypeError, AttributeError) as failure:
            raise CannotStart(f"kubectl's list of pods cannot be read: {failure}") from None

    async def create(self, objects: Sequence[Object]) -> None:
        """Raises CannotStart; some of them may be there then."""
        await self._answered("create", "-f", "-", given=_list(objects), answers=len(objects))

    async def apply(self, objects: Sequence[Object]) -> None:
        """Raises CannotStart."""
        await self._answered("apply", "-f", "-", given=_list(objects), answers=len(objects))

    async def patch(self, kind: str, name: str, change: Object) -> None:
        """Raises CannotStart."""
        await self._answered("patch", kind, name, "--type=merge", "-p", json.dumps(change))

    async def uid(self, kind: str, name: str) -> str:
        """Raises CannotStart if there is none, or nobody says."""
        return await self._answered("get", kind, name, "-o", "jsonpath={.metadata.uid}")

    async def delete(self, *pods: str, grace: float) -> None:
        """Tells them to end; they are killed after `grace` seconds, or one, which is the least. Raises CannotStart."""
        seconds = max(1, round(grace))
        await self._answered("delete", "pod", *pods, "--ignore-not-found", "--wait=false", f"--grace-period={seconds}")

    async def forget(self, *pods: str) -> None:
        """Removes them whether their nodes answer or not. Raises CannotStart."""
        force = ("--ignore-not-found", "--wait=false", "--force", "--grace-period=0")
        await self._answered("delete", "pod", *pods, *force)

    async def remove(self, *kinds_and_flags: str) -> None:
        """Deletes without waiting. Raises CannotStart."""
        await self._answered("delete", *kinds_and_flags, "--ignore-not-found", "--wait=false")

    async def restart(self, deployment: str) -> None:
        """Replaces its pods, one after the other; raises CannotStart."""
        await self._answered("rollout", "restart", f"deployment/{deployment}")

    async def remove_all(self) -> None:
        """Deletes all that the service consists of. Raises CannotStart."""
        await self._answered("delete", _KINDS, "-l", everything_of(self._name), "--wait=false", answers=10)

    async def _answered(self, *arguments: str, given: str = "", answers: int = 1) -> str:
        """`answers`: how often kubectl will ask the server."""
        timeout = ANSWER * max(1, answers / 4) + _MARGIN
        command = self.command(*_patience(), *arguments)
        return await typed(command, os.environ, timeout, _SILENT, given)

    def check(self) -> tuple[int, int]:
        """The cluster's version. Raises ConfigError unless kubectl is here and a cluster answers it."""
        done = self._done("version", "-o", "json", *_patience(), timeout=ANSWER + _MARGIN)
        try:
            server = json.loads(done.stdout)["serverVersion"]
            return int(server["major"]), int(server["minor"].rstrip("+"))
        except (ValueError, LookupError):
            raise ConfigError(f"no cluster answers kubectl: {last_line(done.stderr, 'kubectl')}") from None

    def take_down(self) -> None:
        """Deletes the service, and returns when it is gone. Raises ConfigError."""
        done = self._done("delete", _KINDS, "-l", everything_of(self._name), "--grace-period=5", timeout=_REMOVAL)
        if done.returncode != 0:
            raise ConfigError(f"{self._name}: {last_line(done.stderr, 'kubectl')}")

    def _done(self, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        command = self.command(*arguments)
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
            )
        except OSError as failure:
            raise ConfigError(f"kubectl: {failure.strerror}: install it, or use another --on") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(_SILENT) from None


def _list(objects: Sequence[Object]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})


def _patience() -> list[str]:
    """How long kubectl waits for an answer. In a pod only we do: with the flag it does not find its cluster."""
    return [] if "KUBERNETES_SERVICE_HOST" in os.environ else [f"--request-timeout={ANSWER:.0f}s"]


def _last_word(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
