"""/v1/realtime as SGLang 0.5.23 serves it: transcription over a WebSocket. What it hears is made up."""

import base64
import json
from typing import Any

from websockets.exceptions import ProtocolError
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side, State
from websockets.utils import accept_key

from tests.lab.exchange import Exchange
from tests.lab.knobs import Knobs

ITEM = "conversation.item"
LARGEST = 16 << 20  # bytes of a message, as with uvicorn


class Session:
    """One client's session: the events that it is sent."""

    def __init__(self, exchange: Exchange, knobs: Knobs) -> None:
        self._exchange = exchange
        self._knobs = knobs
        self._protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=LARGEST)
        self._sent = 0
        self._heard = 0  # bytes of sound since the last commit
        self._is_configured = False

    async def run(self) -> None:
        await self._say("session.created", session={"type": "transcription"})
        connection = self._exchange.connection
        while True:
            self._protocol.receive_data(await connection.take(65536))
            connection.stop_reading()  # nothing is read ahead of what is answered
            for frame in self._protocol.events_received():
                assert isinstance(frame, Frame)
                self._exchange.record.body_length += len(frame.data)
                if frame.opcode is Opcode.TEXT:
                    await self._hear(bytes(frame.data).decode())
                elif frame.opcode is Opcode.BINARY:
                    await self._object("invalid_payload", "Binary frames are not supported on /v1/realtime")
            await self._flush()
            connection.transport.resume_reading()
            if self._protocol.state is not State.OPEN:
                connection.end("answered")
                return

    async def _hear(self, text: str) -> None:
        try:
            event = json.loads(text)
        except ValueError:
            await self._object("invalid_json", "Message is not valid JSON")
            return
        match event.get("type"):
            case "session.update":
                self._is_configured = True
                await self._say("session.updated", session={"type": "transcription"})
            case "input_audio_buffer.append" if not self._is_configured:
                await self._object("invalid_state", "Send session.update before audio frames")
            case "input_audio_buffer.append":
                self._heard += len(base64.b64decode(event["audio"]))
                await self._say(f"{ITEM}.input_audio_transcription.delta", delta=f" t{self._sent:02}")
            case "input_audio_buffer.commit":
                await self._say("input_audio_buffer.committed")
                usage = {"type": "duration", "seconds": self._heard / 32000}
                await self._say(f"{ITEM}.input_audio_transcription.completed", transcript="as said", usage=usage)
                self._heard = 0
            case unknown:
                await self._object("unknown_event", f"Unknown event type: {unknown}")

    async def _object(self, code: str, message: str) -> None:
        await self._say("error", error={"type": "invalid_request_error", "code": code, "message": message})

    async def _say(self, kind: str, **more: Any) -> None:
        self._protocol.send_text(json.dumps({"type": kind, "event_id": f"event_{self._sent}", **more}).encode())
        self._sent += 1
        await self._flush()
        if self._sent == self._knobs.cut_after and self._knobs.cut == "after_tokens":
            self._exchange.connection.cut(self._knobs.cut_by)

    async def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                await self._exchange.write(data)


async def converse(exchange: Exchange, knobs: Knobs) -> None:
    """Switches protocols and goes on until the session is over."""
    exchange.keeps_alive = False
    key = exchange.record.header("sec-websocket-key") or ""
    head = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    head.append(f"Sec-WebSocket-Accept: {accept_key(key)}")
    exchange.record.status = 101
    await exchange.write("\r\n".join([*head, "", ""]).encode())
    try:
        await Session(exchange, knobs).run()
    except ProtocolError:
        exchange.connection.cut("close")
