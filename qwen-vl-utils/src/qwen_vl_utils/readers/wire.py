"""Messages between a process and its decoder processes: JSON, and bytes behind it. Nothing is unpickled."""

import json
import socket
import struct
from typing import Any

LENGTHS = struct.Struct("!IQ")
"""In front of a message: bytes of its JSON, bytes of its payload."""


def send(channel: socket.socket, message: dict[str, Any], payload: Any = b"") -> None:
    """Write one message; the payload travels behind the JSON, as it is."""
    text = json.dumps(message).encode()
    size = memoryview(payload).nbytes
    channel.sendall(LENGTHS.pack(len(text), size) + text)
    if size:
        channel.sendall(payload)


def receive(channel: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Read one message and its payload; None where the other side is gone."""
    head = _exactly(channel, LENGTHS.size)
    if head is None:
        return None
    text_length, payload_length = LENGTHS.unpack(head)
    text, payload = _exactly(channel, text_length), _exactly(channel, payload_length)
    return None if text is None or payload is None else (json.loads(text), payload)


def _exactly(channel: socket.socket, length: int) -> bytes | None:
    buffer, filled = bytearray(length), 0
    while filled < length:
        count = channel.recv_into(memoryview(buffer)[filled:])
        if not count:
            return None
        filled += count
    return bytes(buffer)
