from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import ClusterConfig, threads_per_worker
from engine.config import EngineConfig
from router.config import RouterConfig
from settings.file import SettingsError, read_settings, validate_settings


def problem(text: str, tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_settings(path, ClusterConfig)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefil: {replicas: 1}", "prefil: unknown key; did you mean prefill?"),
        ("router: {grpc_prot: 1}", "router.grpc_prot: unknown key; did you mean grpc_port?"),
        ("router: {xyz: 1}", "router.xyz: unknown key; known here: "),
        ("decode: {replicas: -1}", "decode.replicas: Input should be greater than or equal to 0, given -1"),
        ("router: {grpc_port: many}", "router.grpc_port: Input should be a valid integer"),
        ("engine: {max_batch_tokens: 8, max_running_sequences: 9}", "max_running_sequences (9) exceeds"),
        ("engine: {device: tpu}", "engine.device"),
        ("- a\n- b", "expected keys and values at the top, found list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_errors_name_file_key_and_what_would_be_right(text: str, words: str, tmp_path: Path) -> None:
    message = problem(text, tmp_path)
    assert "cluster.yaml" in message
    assert words in message


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    assert len(problem("prefil: 1\nrouter: {grpc_port: x}", tmp_path).splitlines()) == 2


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("")
    assert read_settings(path, ClusterConfig) == ClusterConfig()


def test_pools_override_the_shared_sections() -> None:
    config = validate_settings(
        {
            "model": "/m",
            "engine": {"max_batch_tokens": 512, "threads": 3},
            "prefill": {"engine": {"max_batch_tokens": 2048}},
            "router": {"internal_port": 9},
        },
        ClusterConfig,
        "test",
    )
    prefill, decode = config.worker_settings("prefill"), config.worker_settings("decode")
    assert (prefill.engine.max_batch_tokens, decode.engine.max_batch_tokens) == (2048, 512)
    assert prefill.engine.model == decode.engine.model == config.router_config().model == "/m"
    assert prefill.engine.threads == 3
    assert decode.worker.router_addresses == ("127.0.0.1:9",)


@pytest.mark.parametrize(
    ("sections", "decode_ms"),
    [
        ({}, 50.0),
        ({"engine": {"itl_target_ms": 30}}, 30.0),
        ({"decode": {"engine": {"itl_target_ms": 20}}}, 20.0),
        ({"engine": {"itl_target_ms": 0}}, 0.0),
    ],
)
def test_prompts_make_way_for_decodes_wherever_they_run(sections: dict[str, Any], decode_ms: float) -> None:
    config = ClusterConfig.model_validate({"router": {"itl_target_ms": 50}, **sections})
    assert config.worker_settings("decode").engine.itl_target_ms == decode_ms
    shared = 50.0 if config.engine.itl_target_ms is None else config.engine.itl_target_ms
    assert {config.worker_settings(role).engine.itl_target_ms for role in ("prefill", "standby")} == {shared}


def test_a_standby_is_what_a_worker_of_any_role_is() -> None:
    config = ClusterConfig.model_validate({"standby": {"replicas": 2, "engine": {"max_batch_tokens": 256}}})
    assert config.worker_settings("standby").engine.max_batch_tokens == 256
    assert {role: pool.replicas for role, pool in config.pools.items()} == {"prefill": 1, "decode": 1, "standby": 2}
    assert ClusterConfig().standby.replicas == 0


def test_the_served_name_is_the_models_or_the_configured_one() -> None:
    assert ClusterConfig().served_name == "smollm2-135m-instruct"
    assert ClusterConfig(model="org/some-model@main").served_name == "some-model"
    assert ClusterConfig(router=RouterConfig(served_model_name="ours")).served_name == "ours"


def test_a_bad_override_is_named() -> None:
    config = ClusterConfig.model_validate({"decode": {"engine": {"blok_tokens": 1}}})
    with pytest.raises(SettingsError, match="did you mean block_tokens"):
        config.worker_settings("decode")


def test_workers_share_the_cores() -> None:
    assert threads_per_worker(10_000) == 1


def test_words_that_yaml_takes_for_something_else() -> None:
    """`on`, `off` and a lone number, without quotes."""
    config = EngineConfig.model_validate(yaml.safe_load("{async_scheduling: on, pin_threads: off}"))
    assert (config.async_scheduling, config.pin_threads) == ("on", "off")
    assert EngineConfig.model_validate(yaml.safe_load("pin_threads: 0")).pin_threads == "0"
