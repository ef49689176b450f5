"""Bytes as a client that means harm, or has another schema, may send them."""

from __future__ import annotations

from hypothesis import strategies as st


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


_NUMBERS = st.one_of(st.integers(1, 15), st.sampled_from([0, 99, 19000, (1 << 29) - 1, 1 << 29]))
_INTEGERS = st.one_of(
    st.integers(0, 300), st.sampled_from([-1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
)
_TEXTS = st.one_of(st.text(max_size=20).map(lambda s: s.encode("utf-8", "surrogatepass")), st.binary(max_size=20))


def _fields(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    one = st.one_of(
        st.builds(lambda n, v: varint(n << 3) + varint(v), _NUMBERS, _INTEGERS),
        st.builds(lambda n, v: varint(n << 3 | 5) + v, _NUMBERS, st.binary(min_size=4, max_size=4)),
        st.builds(lambda n, v: varint(n << 3 | 1) + v, _NUMBERS, st.binary(min_size=8, max_size=8)),
        st.builds(field, _NUMBERS, st.one_of(_TEXTS, inner)),
        st.builds(lambda n, kind: varint(n << 3 | kind), _NUMBERS, st.sampled_from([3, 4, 6, 7])),
    )
    return st.lists(one, max_size=5).map(b"".join)


def soup() -> st.SearchStrategy[bytes]:
    """Fields of any number and type, nested: mostly well-formed protobuf of no particular schema."""
    return st.recursive(_TEXTS, _fields, max_leaves=8)


@st.composite
def mutated(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """A real message, then: cut, overwritten, doubled, or with bytes in between."""
    data = draw(messages)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        noise = draw(st.binary(max_size=6))
        match draw(st.sampled_from(["cut", "overwrite", "insert", "double"])):
            case "cut":
                data = data[:at]
            case "overwrite":
                data = data[:at] + noise + data[at + len(noise) :]
            case "insert":
                data = data[:at] + noise + data[at:]
            case "double":
                data = data[:at] + data
    return data
