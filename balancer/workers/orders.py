"""What the supervisor tells its processes, a byte each, over a pipe whose end they see when it is gone."""

import asyncio
import enum
import os


class Order(bytes, enum.Enum):
    LEAVE = b"l"  # finish the requests that there are, and end
    RELEASE = b"r"  # another process takes over: close the ports at once, then leave
    HURRY = b"h"  # break off what is left
    END = b"e"  # the coordinator only: no relay is left


class Orders:
    """The orders of one process. If the supervisor dies, the process ends at once, as the supervisor did."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pipe: int) -> None:
        self.leaving = asyncio.Event()
        self.released = asyncio.Event()
        self.hurry = asyncio.Event()
        self.end = asyncio.Event()
        self._pipe = pipe
        loop.add_reader(pipe, self._read)

    def _read(self) -> None:
        said = os.read(self._pipe, 64)
        if not said:
            os._exit(1)
        for number in said:
            match Order(bytes((number,))):
                case Order.LEAVE:
                    self.leaving.set()
                case Order.RELEASE:
                    self.released.set()
                    self.leaving.set()
                case Order.HURRY:
                    self.hurry.set()
                case Order.END:
                    self.end.set()
