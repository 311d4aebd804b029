"""FastAPI routes of the serving port: the balancer's health, and a replica's configuration without its secrets."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from balancer import errors
from balancer.errors import ServeError
from balancer.observe.snapshot import take_snapshot
from balancer.relay.paths import MODELS, OLLAMA_MODELS
from balancer.service import Service

PATIENCE = 5.0  # seconds that one replica has to answer
SOON = 5.0  # seconds after which no further replica is asked

OLLAMA_VERSION = "0.9.0"  # whose API SGLang 0.5.23 follows

SECRET_WORDS = ("api_key", "password", "secret", "hf_token", "ssl_key", "authorization")


def public_app(services: Sequence[Service], client: httpx.AsyncClient) -> FastAPI:
    """The app behind /health, /ready and /server_info, and the lists of models where there are several services.

    `client` asks the replicas, each with its service's key.
    """
    facts = services[0].facts
    app = FastAPI(title="groundserve", docs_url=None, redoc_url=None, openapi_url=None)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        """200 if a request could be served now."""
        return _say(_ready() > 0)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        """Like /health, but 503 from the moment the balancer is told to stop, so that traffic can be sent elsewhere."""
        return _say(_ready() > 0 and not facts.is_leaving)

    @app.api_route("/server_info", methods=["GET", "HEAD"])
    @app.api_route("/get_server_info", methods=["GET", "HEAD"])
    async def server_info() -> Response:
        """A ready replica's configuration. SGLang shows its API key there; here all secrets are removed."""
        until = time.monotonic() + SOON
        every = [(service.config.replica_key, member) for service in services for member in service.fleet.serving()]
        for key, member in every:
            if time.monotonic() > until:
                break
            try:
                async with asyncio.timeout(PATIENCE):
                    answer = await client.get(f"{member.url}/server_info", headers=_bearing(key), timeout=None)
                info = answer.json() if answer.status_code == 200 else None
            except (httpx.HTTPError, TimeoutError, ValueError):
                continue
            if isinstance(info, dict):
                return JSONResponse(without_secrets(info), headers={"X-Replica-Id": member.name})
        return _refusal(errors.no_replica())

    @app.api_route("/api/version", methods=["GET", "HEAD"])
    async def ollama_version() -> Response:
        """Ollama's clients ask for it first, and take a newer one for granted. SGLang has no such path."""
        return JSONResponse({"version": OLLAMA_VERSION})

    @app.api_route(MODELS, methods=["GET", "HEAD"])
    async def models() -> Response:
        """All models of all services, including services that have no replica now."""
        return JSONResponse({"object": "list", "data": [entry for service in services for entry in listed(service)]})

    @app.api_route(OLLAMA_MODELS, methods=["GET", "HEAD"])
    async def ollama_models() -> Response:
        """The same in Ollama's format."""
        return JSONResponse({"models": [_for_ollama(entry) for service in services for entry in listed(service)]})

    def _ready() -> int:
        return sum(len(service.fleet.serving()) for service in services)

    def _say(could_serve: bool) -> Response:
        if could_serve:
            return JSONResponse({"status": "ok", "ready": _ready()})
        return _refusal(errors.shutting_down() if facts.is_leaving else errors.no_replica())

    return app


def _bearing(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def listed(service: Service) -> list[dict[str, Any]]:
    """The service's models in OpenAI's format: as its replicas list them, then under the service's other names.

    `service` and `status` are our additions. Until a replica has reported its models, the service's own name stands in.
    """
    fleet = service.fleet
    status: str = take_snapshot(service.facts, fleet, service.admission).service.status
    if not fleet.available() and (resting := fleet.resting()):
        status = resting[0].status(fleet.clock())
    ours = {"service": service.facts.name, "status": status}
    models = list(service.fleet.models.values())
    root = str(models[0]["id"]) if models else service.facts.name
    other = [name for name in (service.facts.name, *service.settings.aliases) if name not in service.fleet.models]
    more = [{"id": name, "object": "model", "created": 0, "owned_by": "groundserve", "root": root} for name in other]
    return [entry | ours for entry in (*models, *more)]


def _for_ollama(entry: dict[str, Any]) -> dict[str, Any]:
    """As SGLang lists its own model there; how large it is nobody here knows."""
    name = str(entry["id"])
    created = entry.get("created")
    since = datetime.fromtimestamp(created if isinstance(created, int) and 0 <= created < 2**32 else 0, UTC)
    family = str(entry.get("root") or name).rpartition("/")[2]
    details = {"format": "sglang", "family": family, "parameter_size": "unknown"}
    return {
        "name": name,
        "model": name,
        "modified_at": since.isoformat(),
        "size": 0,
        "digest": f"sha256:{sha256(name.encode()).hexdigest()}",
        "details": details,
    }


def _refusal(error: ServeError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return Response(error.body, error.status, headers, media_type="application/json")


def without_secrets(value: Any) -> Any:
    """The same JSON value without object keys that name a secret, and without command lines, which may show one."""
    if isinstance(value, dict):
        return {
            key: without_secrets(item)
            for key, item in value.items()
            if not any(word in str(key).lower() for word in SECRET_WORDS) and key != "launch_command"
        }
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return value
