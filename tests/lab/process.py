"""A lab replica as a process: flags, the control port, and the effect of SIGTERM on a real SGLang."""

import argparse
import asyncio
import ctypes
import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

from tests.lab.knobs import FAITHFUL, BadKnob, Knobs
from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.lab.tenant import Seat

PR_SET_PDEATHSIG = 1


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. There is one for every knob and model setting that is a single number or word."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.replica", description="A simulated SGLang replica.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--start-delay", type=float, default=0.0, help="seconds before it listens")
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds of 503 from /ready and /health then")
    parser.add_argument("--faithful", action="store_true", help="timing, caching and limits from the model")
    parser.add_argument("--drain-plugin", action="store_true", help="on SIGTERM, drain as our plug-in does")
    parser.add_argument("--drain-grace", type=float, default=5.0, help="seconds of it (the plug-in: 5)")
    parser.add_argument("--exit-look", type=float, default=5.0, help="seconds between looks at SIGTERM (SGLang: 5)")
    for title, kind in (("knobs", Knobs), ("the model, with --faithful", ModelSettings)):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(kind):
            if field.name in ("headers", "interim") or (kind is Knobs and field.name in MODELS_OWN):
                continue
            group.add_argument(f"--{field.name.replace('_', '-')}", type=_read, metavar="VALUE")
    sharing = parser.add_argument_group("sharing GPUs (tests/lab/tenant.py)")
    sharing.add_argument("--seat", type=Path, metavar="DIRECTORY", help="where their leases lie")
    sharing.add_argument("--seat-gpus", type=lambda text: tuple(text.split(",")), metavar="GPU,...")
    for name in SEATS_OWN:
        sharing.add_argument(f"--seat-{name.replace('_', '-')}", type=str if name == "note" else float, metavar="VALUE")
    return parser.parse_args(argv)


SEATS_OWN = [field.name for field in dataclasses.fields(Seat) if field.name not in ("directory", "gpus")]
MODELS_OWN = {field.name for field in dataclasses.fields(ModelSettings)}


def _read(text: str) -> int | float | bool | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)


def build(flags: argparse.Namespace) -> LabReplica:
    """The replica that the flags describe. Raises BadKnob."""
    given = {name: value for name, value in vars(flags).items() if value is not None}
    model = None
    limits: dict[str, Any] = {name: given[name] for name in MODELS_OWN if name in given}
    if flags.faithful:
        model = ModelSettings(**limits)
        limits = {}
    changes = {field.name: given[field.name] for field in dataclasses.fields(Knobs) if field.name in given}
    knobs = (FAITHFUL if flags.faithful else Knobs()).change(**limits | changes)
    return LabReplica(knobs, model=model, seat=_seat(given), host=flags.host, port=flags.port)


def _seat(given: dict[str, Any]) -> Seat | None:
    own = {name: given[f"seat_{name}"] for name in ("gpus", *SEATS_OWN) if f"seat_{name}" in given}
    return Seat(given["seat"], **own) if "seat" in given else None


async def until_exit(replica: LabReplica, began: float, look: float, grace: float | None) -> None:
    """Return when SGLang would end its process after SIGTERM.

    Stock SGLang (`grace` None) checks every `look` seconds, counted from its start, and ends at the first check that
    finds it unhealthy or with nothing in flight. With our plug-in it serves for `grace` seconds, then until nothing is
    in flight.
    """
    replica.exiting = True
    if grace is None:
        await asyncio.sleep(look - (time.monotonic() - began) % look)
        while replica.generating and (replica.live is None or replica.live.is_healthy):  # noqa: ASYNC110
            await asyncio.sleep(look)
    else:
        await asyncio.sleep(grace)
        await replica.seen.until(lambda _: not replica.generating, timeout=None)


async def serve(flags: argparse.Namespace) -> NoReturn:
    """Run until SIGTERM or SIGINT, then end as SGLang does: the kernel resets whatever is still open."""
    began = time.monotonic()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    replica = build(flags)
    replica.die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    control = await replica.open_control()
    print(f"control {control}", flush=True)
    await asyncio.sleep(flags.start_delay)
    await replica.start(warming=flags.warm_up > 0)
    print(f"ready {replica.url}", flush=True)
    if flags.warm_up:
        asyncio.get_running_loop().call_later(flags.warm_up, replica.warmed_up)
    await stop.wait()
    await until_exit(replica, began, flags.exit_look, flags.drain_grace if flags.drain_plugin else None)
    os._exit(1 if replica.seen.crashes else 0)


def main() -> None:
    flags = arguments()
    # A test that dies leaves no replica behind.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        import uvloop

        uvloop.run(serve(flags))
    except BadKnob as error:
        raise SystemExit(f"lab replica: {error}") from None
