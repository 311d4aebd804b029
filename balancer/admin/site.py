"""The page at `/` of the admin port: its files, its feed, its playground."""

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from balancer.admin.feed import Feed, feed_router

FILES = Path(__file__).parent / "page"


def add_page(app: FastAPI, feeds: Sequence[Feed]) -> None:
    """Adds the page to the admin port's app. Browsers ask for its files each time, and get a 304 if unchanged."""

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(FILES / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=FILES), name="page")
    app.include_router(feed_router(feeds))
