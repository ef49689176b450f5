"""Whatever a settings file holds: settings that can be used, or an error that names the file and the place."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from deploy.config import ClusterConfig
from router.__main__ import RouterSettings
from settings.file import SettingsError, read_settings
from tests.support.fuzz import examples
from worker.settings import WorkerSettings

MODELS: list[type[BaseModel]] = [ClusterConfig, WorkerSettings, RouterSettings]


def names_of(model: type[BaseModel]) -> set[str]:
    names = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= names_of(field.annotation)
    return names


NAMES = sorted({name for model in MODELS for name in names_of(model)})
SECTIONS = ["engine", "transport", "worker", "router", "prefill", "decode", "telemetry", "logging", "ray"]

# Scalars as people and accidents write them: what YAML takes for a number, a date, a tag, and refuses inside.
SCALARS = st.one_of(
    st.sampled_from(
        [
            *("1", "0", "-1", "1.5", "true", "null", "~", "''", "auto", "embedded", "float32", ".inf", "-.inf", ".nan"),
            *("1e400", "1.0e+400", "nan", "Infinity", "0x_", "0b_", "1:60:90", "2024-13-45", "!!int foo", "!!int ''"),
            *("!!bool foo", "!!timestamp x", "!!binary x", "!!float x", "!!set {a, b}", "!!omap [a: b]", "!!null x"),
            *("!!python/object:os.system x", "!nope 1", r'"\ud800"', r'"\0"', r'"\U00110000"', "1" * 5000),
            *("0x" + "f" * 10_000, "x" * 5000, "[1, 2]", "{a: 1}", "*a", "&a 1", "&a [*a]", "<<", "|\n  x", "? [a]"),
            *("1e300", "99999999999999999999", "é", "😀", "@", "`", "%", "- 1", "'", '"', "#", "\t", "\x00", "\x85"),
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
)
KEYS = st.one_of(st.sampled_from(NAMES + SECTIONS), SCALARS)


def flow(inner: Any) -> Any:
    return st.one_of(
        st.lists(inner, max_size=4).map(lambda v: f"[{', '.join(v)}]"),
        st.lists(st.tuples(KEYS, inner), max_size=4).map(lambda v: f"{{{', '.join(f'{a}: {b}' for a, b in v)}}}"),
    )


VALUES = st.recursive(SCALARS, flow, max_leaves=6)
SECTION = st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=5).map(
    lambda v: f"{{{', '.join(f'{a}: {b}' for a, b in v)}}}"
)
DOCUMENTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass")),
    st.lists(st.tuples(KEYS, VALUES), max_size=5).map(lambda v: "\n".join(f"{a}: {b}" for a, b in v).encode()),
    st.lists(st.tuples(st.sampled_from(SECTIONS), SECTION), max_size=4).map(
        lambda v: "\n".join(f"{a}: {b}" for a, b in v).encode()
    ),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
        (
            lambda inner: st.one_of(
                st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES + SECTIONS), inner)
            )
        ),
        max_leaves=8,
    ).map(lambda v: yaml.safe_dump(v).encode()),
)


def outcome(path: Path, model: type[BaseModel]) -> BaseModel | str:
    """Settings, or what the error says."""
    began = time.monotonic()
    try:
        result: BaseModel | str = read_settings(path, model)
    except SettingsError as error:
        result = str(error)
    assert time.monotonic() - began < 10
    return result


def check_usable(value: Any) -> None:
    if isinstance(value, float):
        assert math.isfinite(value)
    elif isinstance(value, str):
        assert "\0" not in value
        value.encode()
    elif isinstance(value, dict):
        for pair in value.items():
            check_usable(list(pair))
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_usable(one)


def replica_of(config: ClusterConfig, role: str, origin: str) -> dict[str, Any]:
    try:
        return config.worker_settings(role, origin=origin).model_dump()
    except SettingsError as error:
        said = str(error)
    assert said.startswith(f"{origin}: {role}: ")
    return {}


def check(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    for model in MODELS:
        result = outcome(path, model)
        if isinstance(result, str):
            lines = result.splitlines()
            assert 1 <= len(lines) <= 21
            assert lines[0].startswith(f"{path}: ")
            assert len(result) < 21 * 1500
            continue
        check_usable(result.model_dump())
        if isinstance(result, ClusterConfig):
            for role in ("prefill", "decode"):
                check_usable(replica_of(result, role, str(path)))


@examples(400)
@given(content=DOCUMENTS)
@example(content=b"router: {host: 2024-13-45}")  # ValueError, AttributeError, IndexError, KeyError inside PyYAML
@example(content=b"router: {host: !!timestamp x}")
@example(content=b"router: {host: !!int ''}")
@example(content=b"router: {host: !!bool foo}")
@example(content=b"router: {grpc_port: 0x" + b"f" * 10_000 + b"}")  # an integer that Python refuses to print
@example(content=b"router: {default_deadline_s: 1e400}")  # text to YAML, infinity to pydantic
@example(content=b'router: {host: "\\ud800"}')
def test_any_file_gives_settings_or_a_settings_error(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp()
    check(content, directory / "fuzz.yaml")


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 3)}]}}\n"
    for old, new in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "elements, aliases written out"),
        (f"router: {{host: *l}}\n{LAUGHS}", "undefined alias"),
        (MERGES, "elements, aliases written out"),
        ("a: &a [*a]", "an anchor that contains itself"),
        ("a: &a {b: {c: *a}}", "an anchor that contains itself"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ("{a: " * 50_000, "nested deeper than 32 levels"),
        ("- " * 50_000, "nested deeper than 32 levels"),
        ("router: [" + "1," * 100_000 + "]", "elements, aliases written out"),
        ("x" * (300 << 10), "longer than 262144 bytes"),
        ("router: {host: a, host: b}", "the key 'host' is given twice"),
        ("router: {host: 2024-13-45}", "'2024-13-45' is not a valid timestamp; quote it if it is text"),
        ("router: {default_deadline_s: .inf}", "router.default_deadline_s: use a finite number, given inf"),
        ("router: {heartbeat_s: .nan}", "router.heartbeat_s: "),
        (r'router: {host: "\ud800"}', r"router.host: use text without NUL and lone surrogates, given '\ud800'"),
        ("router: {max_deadline_s: 1.0e+300}", "router.max_deadline_s: Input should be less than"),
        ("\n".join(f"key{i}: 1" for i in range(5000)), "there are more problems"),
        (f"router: {{host: [{'x' * 100_000}]}}", "router.host: Input should be a valid string"),
    ],
)
def test_bombs_end_at_once_and_say_why(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = outcome(path, RouterSettings)
    assert isinstance(result, str)
    assert words in result
    assert len(result) < 21 * 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_anchors_serve_as_they_should(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("prefill: &pool {replicas: 2, engine: {threads: 3}}\ndecode: {<<: *pool, replicas: 4}")
    config = read_settings(path, ClusterConfig)
    assert (config.prefill.replicas, config.decode.replicas) == (2, 4)
    assert config.decode.engine == {"threads": 3}


def test_a_path_that_cannot_be_one_is_named() -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings("a\0b", ClusterConfig)
