"""One tensor of the Open Inference Protocol as Python values. Raises RequestRefused with tensor, cause and fix."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from router.errors import Code, RequestRefused, refuse

# datatype -> (struct code of one element, field of InferTensorContents)
_NUMBERS = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
}
_INTEGERS = ("INT32", "INT64", "UINT32", "UINT64", "INT16", "UINT16", "INT8", "UINT8")
_MAX_DIMENSIONS = 8
_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """`elements`: the most that it may hold; 1 means exactly one. Other integer or float widths are taken as well:
    Triton's backends differ in them, and a value that does not fit is refused by its own rule.
    """

    datatype: str
    elements: int = 1

    @property
    def accepted(self) -> tuple[str, ...]:
        if self.datatype in _INTEGERS:
            return _INTEGERS
        return ("FP32", "FP64") if self.datatype == "FP32" else (self.datatype,)


def invalid(field: str, message: str) -> RequestRefused:
    return refuse(Code.INVALID_ARGUMENT, message, field=field)


def shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}...")


def check_declared(name: str, datatype: str, shape: Sequence[int], spec: TensorSpec) -> int:
    """The number of elements that the shape says."""
    if datatype not in spec.accepted:
        raise invalid(name, f"input {name!r} has datatype {shown(datatype)}; send it as {spec.datatype}")
    if len(shape) > _MAX_DIMENSIONS or any(d < 0 for d in shape):
        raise invalid(name, f"input {name!r} has shape {list(shape[:_MAX_DIMENSIONS])}; send {_shape_words(spec)}")
    count = math.prod(shape)
    if (spec.elements == 1 and count != 1) or count > spec.elements:
        one = " (one request a message: batches are sent as several requests)" if name == "text_input" else ""
        raise invalid(name, f"input {name!r} has shape {list(shape)}; send {_shape_words(spec)}{one}")
    return count


def _shape_words(spec: TensorSpec) -> str:
    return "[1] or [1, 1]" if spec.elements == 1 else f"[n] or [1, n] with n up to {spec.elements}"


def from_raw(name: str, datatype: str, count: int, data: bytes) -> list[Any]:
    if datatype == "BYTES":
        return _bytes_elements(name, count, data)
    code = f"<{count}{_NUMBERS[datatype][0]}"
    if len(data) != struct.calcsize(code):
        raise invalid(
            name,
            f"the raw content of input {name!r} has {len(data)} bytes; {count} x {datatype} are "
            f"{struct.calcsize(code)}: send them little-endian and without padding",
        )
    return list(struct.unpack(code, data))


def _bytes_elements(name: str, count: int, data: bytes) -> list[bytes]:
    elements, at = [], 0
    for _ in range(count):
        size = int.from_bytes(data[at : at + 4], "little") if len(data) >= at + 4 else -1
        if size < 0 or len(data) < at + 4 + size:
            raise invalid(
                name,
                f"the raw content of input {name!r} ends inside an element; "
                "send each BYTES element behind its length (4 bytes, little-endian)",
            )
        elements.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data):
        raise invalid(
            name,
            f"the raw content of input {name!r} has {len(data) - at} bytes behind its last element; leave them out",
        )
    return elements


def from_contents(name: str, datatype: str, count: int, contents: Any) -> list[Any]:
    """`contents`: anything with the fields of InferTensorContents."""
    field = "bytes_contents" if datatype == "BYTES" else _NUMBERS[datatype][1]
    values = getattr(contents, field)
    if len(values) != count:
        raise invalid(
            name,
            f"input {name!r} has {len(values)} elements in {field} and a shape of {count}; "
            f"{datatype} goes there, or into raw_input_contents",
        )
    return list(values)


def text_of(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(name, f"input {name!r} is not valid UTF-8 at byte {error.start}; encode text as UTF-8") from None


def bytes_to_raw(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "little") + data


def count_to_raw(count: int) -> bytes:
    return struct.pack("<I", count)
