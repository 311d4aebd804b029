"""The service's readiness probe, for replicas that the balancer must not know about yet."""

from collections.abc import Mapping

import httpx

from balancer.spec.settings import ReadinessProbe


class Readiness:
    """`fields` are headers sent with each probe, unless the probe has its own of the same name."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._client = httpx.AsyncClient(headers=dict(fields), trust_env=False)

    async def ask(self, endpoint: str | None, probe: ReadinessProbe) -> bool:
        """Does the replica answer 200 now?"""
        if endpoint is None:
            return False
        method = "GET" if probe.post_data is None else "POST"
        try:
            answer = await self._client.request(
                method,
                f"{endpoint}{probe.path}",
                json=probe.post_data,
                headers=probe.headers,
                timeout=probe.timeout_seconds,
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def close(self) -> None:
        await self._client.aclose()
