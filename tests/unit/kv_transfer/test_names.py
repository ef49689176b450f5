"""Block names, layout fingerprints, endpoints: what two processes must agree on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.block_hash import HASH_BYTES, chain_hashes, root_hash
from kv_transfer.handoff import PeerHello, PeerId
from kv_transfer.layout import FULL, Group, KvLayout, Rule, explain_mismatch
from kv_transfer.nixl_endpoint import NixlEndpoint
from kv_transfer.transport import KvArea

GROUP = Group(FULL, tuple(range(30)), 3, 64, "bfloat16")
LAYOUT = KvLayout("model", 32, (GROUP,))


def test_names_are_the_same_in_every_process_and_version() -> None:
    """Pinned: a change of these bytes makes caches of two releases blind to each other, and must be a new version."""
    root = root_hash("m", 4, "")
    assert root.hex() == "a50d231f9f4557f49f13343d585884db"
    assert [n.hex() for n in chain_hashes([1, 2, 3, 4], 4, root)] == ["dc7ce4d5b3fcba51a122117b8ef8c0a7"]
    assert len(root) == HASH_BYTES
    assert chain_hashes([1, 2, 3, 4, 5], 4, root) == chain_hashes([1, 2, 3, 4], 4, root)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 8))
def test_extending_a_chain_equals_hashing_it_whole(tokens: list[int], block: int) -> None:
    root = root_hash("m", block, "s")
    whole = chain_hashes(tokens, block, root)
    assert len(whole) == len(tokens) // block
    cut = len(whole) // 2
    head = chain_hashes(tokens[: cut * block], block, root)
    tail = chain_hashes(tokens[cut * block :], block, head[-1] if head else root)
    assert head + tail == whole


def test_salt_identity_and_block_size_separate_names() -> None:
    roots = {root_hash(i, b, s) for i in ("m", "n") for b in (4, 8) for s in ("", "t")}
    assert len(roots) == 8
    assert root_hash("ab", 4, "c") != root_hash("a", 4, "bc"), "fields are delimited"


def test_the_fingerprint_covers_every_field() -> None:
    groups = [
        replace(GROUP, layers=tuple(range(31))),
        replace(GROUP, kv_heads=4),
        replace(GROUP, width=128),
        replace(GROUP, dtype="float16"),
        *(replace(GROUP, rule=Rule(**rule)) for rule in ({"window": 8}, {"chunk": 8}, {"values": 8}, {"state": True})),
    ]
    others = [replace(LAYOUT, groups=(group,)) for group in groups]
    others += [
        replace(LAYOUT, groups=(replace(GROUP, rounding=kind),))
        for kind in ("int8", "int8_values", "fp8", "fp8_values")
    ]
    others += [replace(LAYOUT, model_identity="other"), replace(LAYOUT, block_tokens=16)]
    others += [replace(LAYOUT, groups=(GROUP, GROUP))]
    assert len({layout.fingerprint() for layout in [LAYOUT, *others]}) == len(others) + 1
    assert GROUP.block_bytes(32) == 30 * 2 * 3 * 64 * 2 * 32
    assert replace(GROUP, rounding="int8").block_bytes(32) == 30 * 2 * 3 * (64 + 2) * 32, "and a scale"
    assert replace(GROUP, rounding="int8_values").block_bytes(32) == 30 * 3 * (64 * 2 + 64 + 2 + 2) * 32, "aligned"


def test_a_mismatch_says_what_differs() -> None:
    other_model = replace(LAYOUT, model_identity="x").fingerprint()
    assert "another checkpoint" in explain_mismatch(LAYOUT.fingerprint(), other_model)
    other_layout = replace(LAYOUT, block_tokens=16).fingerprint()
    assert "another KV layout" in explain_mismatch(LAYOUT.fingerprint(), other_layout)
    eight = replace(LAYOUT, model_identity="x", weights="int8 mlp").fingerprint()
    four = replace(LAYOUT, model_identity="y", weights="int4 attention+mlp").fingerprint()
    for own, theirs, words in (
        (LAYOUT.fingerprint(), eight, r"otherwise (int8.mlp) than this worker's (not at all)"),
        (four, eight, r"otherwise (int8.mlp) than this worker's (int4.attention+mlp)"),
        (
            four,
            replace(LAYOUT, weights="fp8 mlp").fingerprint(),
            r"otherwise (fp8.mlp) than this worker's (int4.attention+mlp)",
        ),
        (eight, LAYOUT.fingerprint(), r"otherwise (not at all) than this worker's (int8.mlp)"),
    ):
        assert words in explain_mismatch(own, theirs)
        assert "give both pools the same engine.quantization" in explain_mismatch(own, theirs)
    assert "another checkpoint" in explain_mismatch(eight, replace(LAYOUT, weights="int8 mlp").fingerprint())


AREA = KvArea(1 << 40, 4096, 10)
ENDPOINT = NixlEndpoint(b"h" * 16, (AREA, KvArea(1 << 43, 100, 3)), 1 << 41, 1 << 42, 64, -1, b"metadata")


def with_areas(*areas: KvArea) -> bytes:
    return replace(ENDPOINT, areas=areas).pack()


def test_endpoints_survive_the_wire() -> None:
    for endpoint in (ENDPOINT, replace(ENDPOINT, areas=(AREA,) * 64), replace(ENDPOINT, metadata=b"")):
        assert NixlEndpoint.unpack(endpoint.pack()) == endpoint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 200,
        ENDPOINT.pack()[:50],
        ENDPOINT.pack()[:52] + b"\xff" * 4 + ENDPOINT.pack()[56:],  # 2^32 - 1 areas
        ENDPOINT.pack() + b"x" * (2 << 20),
        with_areas(),
        with_areas(*[AREA] * 65),
        with_areas(AREA, replace(AREA, num_blocks=0)),
        with_areas(AREA, replace(AREA, block_bytes=0)),
        with_areas(AREA, replace(AREA, base_address=0)),
        with_areas(AREA, replace(AREA, base_address=(1 << 64) - 1)),
        with_areas(replace(AREA, block_bytes=1 << 62), AREA),
        with_areas(replace(AREA, num_blocks=(1 << 24) + 1)),
        with_areas(*[replace(AREA, num_blocks=1 << 18)] * 64, AREA),
        with_areas(*[replace(AREA, num_blocks=1 << 23)] * 3),  # each is within bounds, their sum is not
        with_areas(replace(AREA, num_blocks=(1 << 64) - 1), replace(AREA, num_blocks=1)),  # 0, if it wrapped around
        replace(ENDPOINT, generations_address=(1 << 64) - 100).pack(),  # 13 of 8 bytes
    ],
)
def test_a_bad_endpoint_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        NixlEndpoint.unpack(data)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_endpoint_parser(data: bytes) -> None:
    try:
        NixlEndpoint.unpack(data)
    except ValueError:
        pass


def test_schemes_of_weights_exchange_kv_only_where_they_are_told_to() -> None:
    plain = replace(LAYOUT, unquantized="model")
    four = replace(LAYOUT, model_identity="y", weights="int4 mlp", unquantized="model")
    assert plain.fingerprint() == LAYOUT.fingerprint(), "what is in the field stays as it is"
    assert plain.pairing() == four.pairing() == LAYOUT.fingerprint() != four.fingerprint()
    assert replace(four, block_tokens=16).pairing() != plain.pairing() != replace(four, unquantized="z").pairing()
    assert LAYOUT.pairing() == ""

    def hello(layout: KvLayout) -> PeerHello:
        return PeerHello(PeerId("w", 1), layout.fingerprint(), "t", b"", layout.pairing())

    assert hello(plain).fits(hello(plain), mixes=False)
    assert hello(plain).fits(hello(four), mixes=True)
    assert not hello(plain).fits(hello(four), mixes=False)
    assert not hello(LAYOUT).fits(hello(replace(four, unquantized="")), mixes=True), "neither says what it pairs as"
    assert "or set router.mixed_quantization to true" in explain_mismatch(plain.fingerprint(), four.fingerprint())
