"""WebSocket frames (RFC 6455), as far as a relay has to know them: where one ends, and the one that closes."""

_CLOSE = 8
_LARGEST_CONTROL = 125  # bytes
_LENGTHS = {126: 2, 127: 8}  # bytes of the length that follows, by what stands in its place


class BadFrame(ValueError):
    """The bytes are no frame that this side may send."""


class FrameReader:
    """Follows the frames of one direction as their bytes pass by; keeps none of them. Clients' frames are masked."""

    __slots__ = ("_head", "_is_masked", "_left", "is_closed")

    def __init__(self, is_masked: bool) -> None:
        self.is_closed = False  # a frame that closes has passed
        self._is_masked = is_masked
        self._head = b""  # of a frame, as far as it has come
        self._left = 0  # bytes of its payload to come

    @property
    def is_between(self) -> bool:
        """Would the next byte begin a frame?"""
        return not self._left and not self._head

    def pass_by(self, data: bytes) -> None:
        """Raises BadFrame."""
        at = 0
        while at < len(data):
            if self._left:
                step = min(self._left, len(data) - at)
                self._left -= step
                at += step
                continue
            head = self._head + data[at : at + 14 - len(self._head)]
            size = self._size_of(head)
            if len(head) < size:
                self._head = head
                return
            at += size - len(self._head)
            self._head = b""
            self._begin(head[:size])

    def _size_of(self, head: bytes) -> int:
        """How long the whole head is, as far as can be said."""
        return 2 if len(head) < 2 else 2 + _LENGTHS.get(head[1] & 0x7F, 0) + 4 * (head[1] >> 7)

    def _begin(self, head: bytes) -> None:
        if self.is_closed:
            raise BadFrame("a frame after the one that closes")
        code, length = head[0] & 0x0F, head[1] & 0x7F
        if bool(head[1] >> 7) is not self._is_masked:
            raise BadFrame("a frame of a client has to be masked, one of a server must not be")
        if code >= _CLOSE and (length > _LARGEST_CONTROL or not head[0] >> 7):
            raise BadFrame("a control frame that is too long, or in pieces")
        if more := _LENGTHS.get(length):
            length = int.from_bytes(head[2 : 2 + more], "big")
            if length >> 63:
                raise BadFrame("a frame of no possible length")
        self._left = length
        self.is_closed = code == _CLOSE


def close_frame(code: int, why: str, is_masked: bool = False) -> bytes:
    """A frame that closes. A mask of zeros leaves the text as it is."""
    payload = code.to_bytes(2, "big") + why.encode()[: _LARGEST_CONTROL - 2]
    return bytes((0x80 | _CLOSE, len(payload) | is_masked << 7)) + b"\0\0\0\0" * is_masked + payload
