"""Bodies as they come: compressed, or in another character set than JSON's own."""

from __future__ import annotations

import zlib

from router.doors.http.errors import ApiError

ENCODINGS = ("gzip", "deflate")
_GZIP, _ZLIB, _RAW = 31, 15, -15  # zlib's `wbits`
# What clients write in `charset`, and what Python calls it. Only what costs no more to read than UTF-8.
_CHARSETS = {
    **dict.fromkeys((b"utf-8", b"utf8", b"us-ascii", b"ascii"), ""),
    **dict.fromkeys((b"iso-8859-1", b"latin1", b"latin-1"), "latin-1"),
    b"windows-1252": "cp1252",
    b"utf-16": "utf-16",
    b"utf-16le": "utf-16-le",
    b"utf-16be": "utf-16-be",
    b"utf-32": "utf-32",
}


def encoding_of(header: bytes) -> str:
    """Of content-encoding: "" for none. Raises ApiError for one that is not known."""
    named = [part for part in (p.strip().lower() for p in header.split(b",")) if part not in (b"", b"identity")]
    if not named:
        return ""
    name = named[0].removeprefix(b"x-").decode("latin-1")
    if len(named) > 1 or name not in ENCODINGS:
        shown = header[:100].decode("latin-1")
        raise ApiError(415, f"content-encoding {shown!r} is not known here; send {' or '.join(ENCODINGS)}, or none")
    return name


def decompress(data: bytes, encoding: str, limit_bytes: int) -> bytes | None:
    """None: it is longer than the limit, of which no more is read. Raises ApiError for what is no such data."""
    try:
        if encoding == "gzip":
            return _inflate(data, _GZIP, limit_bytes)
        try:
            return _inflate(data, _ZLIB, limit_bytes)
        except zlib.error:
            return _inflate(data, _RAW, limit_bytes)  # what some clients take `deflate` to be
    except zlib.error as error:
        raise ApiError(400, f"the body is not {encoding}, as its content-encoding says: {error}") from None


def _inflate(data: bytes, wbits: int, limit_bytes: int) -> bytes | None:
    parts, size = [], 0
    while data:  # gzip: members, one after the other
        stream = zlib.decompressobj(wbits)
        part = stream.decompress(data, limit_bytes - size + 1)
        size += len(part)
        if size > limit_bytes:
            return None
        if not stream.eof:
            raise zlib.error("it ends too early")
        parts.append(part)
        data = stream.unused_data
        if data and wbits != _GZIP:
            raise zlib.error("something follows its end")
    return b"".join(parts)


def as_utf8(data: bytes, content_type: bytes) -> bytes:
    """Raises ApiError for a character set that is not known, or that the data is not in."""
    at = content_type.lower().find(b"charset=")
    charset = "" if at < 0 else _charset(content_type[at + 8 :])
    if charset:
        try:
            data = data.decode(charset).encode()
        except UnicodeError as error:
            raise ApiError(400, f"the body is not in the charset of its content-type: {error.args[-1]}") from None
    return data.removeprefix(b"\xef\xbb\xbf")  # some write it in front of UTF-8


def _charset(value: bytes) -> str:
    name = value.split(b";")[0].strip(b" \t\"'").lower()
    known = _CHARSETS.get(name)
    if known is None:
        raise ApiError(415, f"charset {name[:100].decode('latin-1')!r} is not known here; send UTF-8")
    return known
