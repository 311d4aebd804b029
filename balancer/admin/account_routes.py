"""Routes of the admin port for keys and their usage."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, HTTPException, Path, Query
from fastapi.responses import JSONResponse, Response

from balancer.accounts.accounts import Accounts
from balancer.admin.openai_usage import Asked
from balancer.admin.openai_usage import page as openai_usage_page
from balancer.contract.account import Digest, KeyName, KeyTerms
from balancer.contract.moment import since
from balancer.errors import ConfigError

PATIENCE = 20.0  # seconds for the disk
Name = Annotated[KeyName, Path()]
Given = Annotated[Digest | None, Query(description="SHA-256 of the secret, in hexadecimal")]


def add_accounts(
    app: FastAPI,
    accounts: Accounts | None,
    with_key: Sequence[Any],
    guarded: Sequence[Any],
    responses: dict[int | str, Any],
) -> None:
    """To look depends on `with_key`, to change on `guarded`: see admin_app."""

    def kept() -> Accounts:
        if accounts is None:
            raise HTTPException(404, "No keys and no usage are kept here: start the balancer with --state FOLDER.")
        return accounts

    Kept = Annotated[Accounts, Depends(kept)]  # noqa: N806 - a type

    @app.get("/keys", dependencies=with_key, responses=responses)
    async def keys(accounts: Kept) -> Response:
        """All keys with their limits, revoked ones too."""
        async with _in_time():
            return JSONResponse([row.to_json() for row in await accounts.keys()])

    @app.post("/keys/{name}", dependencies=guarded, responses=responses)
    async def add(name: Name, terms: KeyTerms, accounts: Kept, digest: Given = None) -> Response:
        """Issues a key. Its secret is in this answer and nowhere else; `digest` is for one that was drawn elsewhere."""
        async with _in_time():
            return _secret(name, await accounts.add(name, terms, _bytes(digest)))

    @app.post("/keys/{name}/rotate", dependencies=guarded, responses=responses)
    async def rotate(name: Name, accounts: Kept, digest: Given = None) -> Response:
        """Gives a key a new secret, as for a new key; the old one is refused from now on."""
        async with _in_time():
            return _secret(name, await accounts.rotate(name, _bytes(digest)))

    @app.put("/keys/{name}", dependencies=guarded, responses=responses)
    async def limit(name: Name, terms: KeyTerms, accounts: Kept) -> dict[str, str]:
        """Gives a key other limits, in place of all that it has; its secret stays."""
        async with _in_time():
            await accounts.limit(name, terms)
        return {"changed": name}

    @app.delete("/keys/{name}", dependencies=guarded, responses=responses)
    async def revoke(name: Name, accounts: Kept) -> dict[str, str]:
        """Refuses the key from now on; its requests under way are finished."""
        async with _in_time():
            await accounts.revoke(name)
        return {"revoked": name}

    @app.get("/usage", dependencies=with_key, responses=responses)
    async def usage(
        accounts: Kept,
        by: Annotated[str, Query(description="what to sum by: key, model, day, hour", max_length=64)] = "key,model,day",
        began: Annotated[
            str, Query(alias="since", description="24h, 30d, 4w, or a date or time (UTC)", max_length=32)
        ] = "30d",
    ) -> Response:
        """What was used, summed by these."""
        groups = [name for name in by.split(",") if name]
        try:
            start = since(began, time.time())
        except ValueError as error:
            raise ConfigError(f"since: {error}") from None
        async with _in_time():
            rows = await accounts.usage(list(dict.fromkeys(groups)), start)
        return Response(b'{"object":"list","data":%b}' % rows, media_type="application/json")

    @app.get("/v1/organization/usage/completions", dependencies=with_key, responses=responses)
    async def openai_usage(
        accounts: Kept,
        start_time: Annotated[int, Query(ge=0, le=10**11, description="seconds since 1970")],
        end_time: Annotated[int | None, Query(ge=0, le=10**11)] = None,
        bucket_width: Annotated[str, Query(description="1d or 1h", max_length=8)] = "1d",
        group_by: Annotated[list[str] | None, Query(description="model, api_key_id", max_length=8)] = None,
        limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
        page: Annotated[str | None, Query(max_length=32)] = None,
    ) -> Response:
        """What was used, as OpenAI's usage API tells it; `api_key_id` is a key's name."""
        end = int(time.time()) + 1 if end_time is None else end_time
        asked = Asked.of(start_time, end, bucket_width, group_by or (), limit, page)
        async with _in_time():
            rows = await accounts.usage(asked.by, asked.start, asked.until)
        return JSONResponse(openai_usage_page(orjson.loads(rows), asked))


@contextlib.asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    except TimeoutError:
        why = f"The disk with keys and usage gave no answer in {PATIENCE:g} s; a change may still be made: see to it."
        raise HTTPException(503, why) from None


def _bytes(digest: str | None) -> bytes | None:
    return None if digest is None else bytes.fromhex(digest)


def _secret(name: str, secret: str) -> Response:
    return JSONResponse({"name": name, "key": secret}, headers={"Cache-Control": "no-store"})
