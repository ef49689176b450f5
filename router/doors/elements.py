"""How many elements a client's message has, counted before anything is made of them.

An element costs its sender two or three bytes, and the router fifty times that in memory and a thousand instructions,
all at once on the event loop: parsers do not stop to let others have their turn. A message of a few bytes cannot hold
many, and is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

_SMALL_BYTES = 1 << 16
MAX_STRINGS = 1 << 15  # of JSON, keys among them
MAX_ELEMENTS = 1 << 20  # of JSON: what commas separate, token ids above all
MAX_BRACKETS = 1 << 16
MAX_FIELDS = 1 << 15  # of a protobuf message and all that are in it
_MAX_NUMBER_BYTES = 4 * MAX_ELEMENTS  # as they are sent, an id has up to four; those of 64 bits count twice
_MAX_VARINT_BYTES = 10


def json_excess(data: bytes) -> str:
    """Empty: it may be parsed. Else what there is too much of. Exact: what stands in strings does not count."""
    if len(data) <= _SMALL_BYTES:
        return ""
    brackets = data.count(b"[") + data.count(b"{")
    if data.count(b'"') <= 2 * MAX_STRINGS and data.count(b",") <= MAX_ELEMENTS and brackets <= MAX_BRACKETS:
        return ""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    strings = plain.count(b'"') // 2
    if strings > MAX_STRINGS:
        return f"{strings} strings and keys, the limit is {MAX_STRINGS}"
    outside = b"".join(plain.split(b'"')[::2])
    elements = outside.count(b",")
    if elements > MAX_ELEMENTS:
        return f"{elements} elements, the limit is {MAX_ELEMENTS}"
    brackets = outside.count(b"[") + outside.count(b"{")
    return f"{brackets} opening brackets, the limit is {MAX_BRACKETS}" if brackets > MAX_BRACKETS else ""


_Parts = Mapping[int, Any]  # field number -> the parts of its message, or the weight of a column's bytes


def proto_excess(data: bytes, descriptor: Any) -> str:
    """The same for a message of this type. What is malformed is the parser's to refuse."""
    if len(data) <= _SMALL_BYTES:
        return ""
    fields, number_bytes = 0, 0
    left: list[tuple[int, int, _Parts]] = [(0, len(data), _parts(descriptor))]
    while left:
        at, end, parts = left.pop()
        while at < end:
            fields += 1
            if fields > MAX_FIELDS:
                return f"more than {MAX_FIELDS} fields"
            tag, at = data[at], at + 1
            if tag > 127:
                tag, at = _varint(data, at - 1, end)
            kind = tag & 7
            if kind == 2:
                size, at = (data[at] if at < end else 0), at + 1
                if size > 127:
                    size, at = _varint(data, at - 1, end)
                if size:
                    part = parts.get(tag >> 3)
                    if isinstance(part, int):
                        number_bytes += min(size, end - at) * part
                    elif part is not None:
                        left.append((at, min(end, at + size), part))
                    at += size
            elif kind == 0:
                _, at = _varint(data, at, end)
            else:
                at += 8 if kind == 1 else 4 if kind == 5 else 0
    return f"more than {_MAX_NUMBER_BYTES} bytes of numbers" if number_bytes > _MAX_NUMBER_BYTES else ""


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Value and what follows; past the end when there is none."""
    value = shift = 0
    for place in range(at, min(end, at + _MAX_VARINT_BYTES)):
        byte = data[place]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + 1
        shift += 7
    return 0, end


@cache
def _parts(descriptor: Any) -> _Parts:
    parts: dict[int, Any] = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            parts[field.number] = _LazyParts(field.message_type)
        elif field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            parts[field.number] = 2
        elif field.cpp_type not in (field.CPPTYPE_STRING,):
            parts[field.number] = 1
    return parts


class _LazyParts:
    """Types may contain themselves."""

    def __init__(self, descriptor: Any) -> None:
        self._descriptor = descriptor

    def get(self, number: int) -> Any:
        return _parts(self._descriptor).get(number)
