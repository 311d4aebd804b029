"""Routes of the admin port for keys and their usage."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Query
from fastapi.responses import JSONResponse, Response

from balancer.accounts.accounts import Accounts
from balancer.contract.account import KeyName, KeyTerms
from balancer.contract.moment import since
from balancer.errors import ConfigError

PATIENCE = 20.0  # seconds for the disk
Name = Annotated[KeyName, Path()]


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
    async def add(name: Name, terms: KeyTerms, accounts: Kept) -> Response:
        """Issues a key. Its secret is in this answer and nowhere else."""
        async with _in_time():
            return _secret(name, await accounts.add(name, terms))

    @app.post("/keys/{name}/rotate", dependencies=guarded, responses=responses)
    async def rotate(name: Name, accounts: Kept) -> Response:
        """Gives a key a new secret; the old one is refused from now on."""
        async with _in_time():
            return _secret(name, await accounts.rotate(name))

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


@contextlib.asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PATIENCE):
            yield
    except TimeoutError:
        why = f"The disk with keys and usage gave no answer in {PATIENCE:g} s; a change may still be made: see to it."
        raise HTTPException(503, why) from None


def _secret(name: str, secret: str) -> Response:
    return JSONResponse({"name": name, "key": secret}, headers={"Cache-Control": "no-store"})
