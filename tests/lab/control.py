"""Control of a lab replica over HTTP: /lab/knobs changes its knobs, /lab/seen returns what it saw."""

import contextlib
from typing import TYPE_CHECKING, Any

import orjson

from tests.lab import answers, service
from tests.lab.exchange import Exchange
from tests.lab.knobs import BadKnob

if TYPE_CHECKING:
    from tests.lab.replica import LabReplica


async def control(replica: "LabReplica", exchange: Exchange) -> None:
    """Answer one /lab request."""
    path, _, query = exchange.head.target.partition("?")
    await exchange.read_body()
    match exchange.head.method, path:
        case "POST", "/lab/knobs":
            try:
                await _turn(replica, orjson.loads(exchange.body))
            except ValueError as error:
                await exchange.reply(400, service.JSON, answers.error(400, str(error), "BadKnob"))
                return
            await exchange.reply(200, service.JSON, orjson.dumps(replica.knobs))
        case "GET", "/lab/knobs":
            await exchange.reply(200, service.JSON, orjson.dumps(replica.knobs))
        case "GET", "/lab/seen":
            after = int(query.partition("after=")[2] or -1)
            with contextlib.suppress(AssertionError):
                await replica.seen.until(lambda seen: seen.version > after, timeout=5.0)
            await exchange.reply(200, service.JSON, orjson.dumps(replica.seen.as_json()))
        case _:
            await exchange.reply(404, service.JSON, answers.error(404, f"no {path} in the lab", "NotFound"))


async def _turn(replica: "LabReplica", asked: Any) -> None:
    if not isinstance(asked, dict):
        raise BadKnob(f"knobs are an object, not {asked!r}")
    count = asked.pop("next", None)
    refuse, drop = asked.pop("refuse", None), asked.pop("drop_connections", False)
    if count is None:
        replica.set(**asked)
    else:
        replica.next(count, **asked)
    if refuse:
        replica.refuse()
    elif refuse is False:
        await replica.accept()
    if drop:
        replica.drop_connections()
