"""What YAML makes of a value is not always what was meant."""

from __future__ import annotations

import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from deploy.config import ClusterConfig
from settings.file import SettingsError, read_settings


def read(tmp_path: Path, text: str) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return read_settings(path, ClusterConfig)


def numbers_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key below `model` that takes a number and no boolean."""
    found = []
    for name, field in model.model_fields.items():
        kinds = {field.annotation}
        if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
            kinds |= set(typing.get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += numbers_of(kind, (*path, name))
        if kinds & {int, float} and bool not in kinds:
            found.append((*path, name))
    return found


def test_yes_is_a_number_nowhere(tmp_path: Path) -> None:
    keys = numbers_of(ClusterConfig)
    assert ("router", "grpc_port") in keys
    assert ("security", "limits", "max_connections") in keys
    for path in keys:
        text = "yes"
        for key in reversed(path):
            text = f"{{{key}: {text}}}"
        with pytest.raises(SettingsError) as refused:
            read(tmp_path, text)
        assert f"{'.'.join(path)}: use a number" in str(refused.value)


@pytest.mark.parametrize("text", ["prefill: {resources: {rack: on}}", "ray: {router_resources: {rack: no}}"])
def test_yes_is_no_number_in_a_table_either(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"resources\.rack: use a number"):
        read(tmp_path, text)


def test_yes_is_a_boolean_where_one_is_wanted(tmp_path: Path) -> None:
    config = read(tmp_path, "security: {insecure_ok: yes}\nengine: {async_scheduling: on}")
    assert config.security.insecure_ok
    assert config.engine.async_scheduling == "on"


@pytest.mark.parametrize("section", sorted(set(ClusterConfig.model_fields) - {"model"}))
def test_an_empty_section_has_its_defaults(tmp_path: Path, section: str) -> None:
    assert read(tmp_path, f"{section}:\n") == ClusterConfig()


@pytest.mark.parametrize(
    "text", ["router: {http: }", "prefill: {engine: , resources: }", "router: {http: {cors_origins: }}"]
)
def test_so_have_sections_lists_and_tables_inside(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == ClusterConfig()


def test_null_still_turns_off_what_it_can_and_is_refused_elsewhere(tmp_path: Path) -> None:
    assert read(tmp_path, "router: {http_port: null}").router.http_port is None
    with pytest.raises(SettingsError, match=r"router\.grpc_port"):
        read(tmp_path, "router: {grpc_port: }")


@pytest.mark.parametrize("value", ["1:2:3", "22:10", "1:30.5"])
def test_no_number_is_counted_in_sixties(tmp_path: Path, value: str) -> None:
    with pytest.raises(SettingsError, match="base 60; quote it"):
        read(tmp_path, f"router: {{grpc_port: {value}}}")


def test_an_ipv6_address_without_quotes_is_told_about_them(tmp_path: Path) -> None:
    assert read(tmp_path, "router:\n  host: ::1\n").router.host == "::1"
    with pytest.raises(SettingsError, match="needs quotes"):
        read(tmp_path, "router:\n  host: ::\n")


def test_sections_that_are_read_by_others_are_held_to_it(tmp_path: Path) -> None:
    """Overrides of a pool are tables until the pool's settings are put together."""
    config = read(tmp_path, "prefill: {engine: {threads: yes}}")
    with pytest.raises(SettingsError, match=r"engine\.threads: use a number"):
        config.worker_settings("prefill")
