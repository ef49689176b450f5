"""Which instructions a build of the native kernels leaves out, on each kind of processor."""

from __future__ import annotations

import pytest

from engine.native import build
from engine.native.build import ISA_VARIABLE, LEVELS, NativeBuildError, built_library, runs_here

AMX = ["-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"]
ARM, AVX2, AVX512 = frozenset[str](), frozenset({"avx2", "fma"}), frozenset({"avx2", "avx512f", "avx512bw"})
ZEN4 = AVX512 | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN4 | {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("features", "left_out"),
    [
        (ARM, {isa: [] for isa in LEVELS}),
        (AVX2, {isa: [] for isa in LEVELS}),
        (AVX512, {"amx": [], "avx512-bf16": [], "avx512": [], "vectors": ["-mno-avx512f"]}),
        (
            ZEN4,
            {
                "amx": [],
                "avx512-bf16": [],
                "avx512": ["-mno-avx512bf16"],
                "vectors": ["-mno-avx512bf16", "-mno-avx512f"],
            },
        ),
        (
            SAPPHIRE_RAPIDS,
            {
                "amx": [],
                "avx512-bf16": AMX,
                "avx512": [*AMX, "-mno-avx512bf16"],
                "vectors": [*AMX, "-mno-avx512bf16", "-mno-avx512f"],
            },
        ),
    ],
)
def test_a_level_leaves_out_what_is_better_and_there(features: frozenset[str], left_out: dict[str, list[str]]) -> None:
    assert {isa: build._left_out(isa, features) for isa in LEVELS} == left_out


def test_a_processor_without_the_feature_does_not_run_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, levels in ((ARM, 1), (AVX2, 1), (AVX512, 2), (ZEN4, 3), (SAPPHIRE_RAPIDS, 4)):
        monkeypatch.setattr(build, "processor_features", lambda features=features: features)
        assert [isa for isa in LEVELS if runs_here(isa)] == list(LEVELS[-levels:])


def test_an_unknown_level_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "avx1024")
    with pytest.raises(NativeBuildError, match=r"DIPTYCH_NATIVE_ISA is avx1024; .* amx, avx512-bf16, avx512, vectors"):
        built_library()
