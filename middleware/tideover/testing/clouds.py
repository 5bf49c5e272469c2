# SPDX-License-Identifier: Apache-2.0
"""How Bedrock and Vertex speak the Messages API: the model in the path, and Bedrock's streams in AWS' frames."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from tideover.testing.wire import Request

BEDROCK = re.compile(r".*/model/(?P<model>[^/]+)/invoke(?P<stream>-with-response-stream)?")
VERTEX = re.compile(r".*/publishers/anthropic/models/(?P<model>[^/]+):(?P<stream>stream)?[rR]awPredict")
AWS_STREAM = "application/vnd.amazon.eventstream"
DATA = re.compile(rb"^data: (.*)$", re.MULTILINE)
CHUNK = {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}
STRING = 7
"""The type of a header's value in AWS' frames."""


def as_messages(request: Request) -> Request | None:
    """A call in the form of the Messages API; None: it is no cloud's. One without the cloud's version is left as it is."""
    cloud = BEDROCK.fullmatch(request.path) or VERTEX.fullmatch(request.path)
    if cloud is None:
        return None
    try:
        body = json.loads(request.body)
        body = {**body, "model": unquote(cloud["model"]), "stream": cloud["stream"] is not None}
    except (ValueError, TypeError):
        return request
    return replace(request, body=json.dumps(body).encode())


def wants_frames(request: Request) -> bool:
    """Whether its stream is to come in AWS' frames."""
    return BEDROCK.fullmatch(request.path) is not None


def framed(events: bytes) -> bytes:
    """Server-sent events as frames of AWS' event stream (Amazon's "Event stream encoding": prelude, headers, payload, CRCs)."""
    return b"".join(frame(data) for data in DATA.findall(events))


def frame(data: bytes) -> bytes:
    payload = json.dumps({"bytes": base64.b64encode(data).decode()}).encode()
    headers = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", STRING, len(value)) + value.encode()
        for name, value in CHUNK.items()
    )
    prelude = struct.pack("!II", 16 + len(headers) + len(payload), len(headers))
    prelude += struct.pack("!I", zlib.crc32(prelude))
    return prelude + headers + payload + struct.pack("!I", zlib.crc32(prelude + headers + payload))
