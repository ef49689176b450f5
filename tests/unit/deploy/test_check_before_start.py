"""What can be known to fail is said before any process starts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from deploy.cluster_up import check_pools_match, check_processors
from deploy.config import ClusterConfig
from deploy.ray_cluster import ClusterStartError
from settings.file import validate_settings


def config(**values: Any) -> ClusterConfig:
    return validate_settings(values, ClusterConfig, "test")


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        ({"block_tokens": 16}, {"block_tokens": 32}, "engine.block_tokens is 16 for prefill and 32 for decode"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, "engine.dtype is float32 for prefill and bfloat16 for decode"),
        ({"quantization": "int8"}, {}, "engine.quantization is int8 for prefill and none for decode"),
        ({"kv_dtype": "int8"}, {}, "engine.kv_dtype is int8 for prefill and model for decode"),
        (
            {"quantization": "int8", "quantized_groups": ["mlp", "attention"]},
            {"quantization": "int8"},
            r"engine.quantized_groups is \('attention', 'mlp'\) for prefill and \('mlp',\) for decode",
        ),
    ],
)
def test_pools_that_could_not_hand_over_are_refused(
    prefill: dict[str, Any], decode: dict[str, Any], words: str
) -> None:
    with pytest.raises(ClusterStartError, match=words):
        check_pools_match(config(prefill={"engine": prefill}, decode={"engine": decode}))


def test_pools_may_differ_in_what_is_no_layout() -> None:
    check_pools_match(config(prefill={"engine": {"max_batch_tokens": 4096}}, decode={"engine": {"num_blocks": 64}}))


@pytest.mark.parametrize("quantization", ["int4", "none"])
def test_groups_of_one_scheme_may_be_written_otherwise(quantization: str) -> None:
    ways: list[list[str]] = [["mlp", "attention", "mlp"], ["attention", "mlp"]]
    if quantization == "none":
        ways.append(["head"])
    for one, other in itertools.combinations(ways, 2):
        ours, theirs = ({"quantization": quantization, "quantized_groups": groups} for groups in (one, other))
        check_pools_match(config(prefill={"engine": ours}, decode={"engine": theirs}))


def test_schemes_of_weights_may_differ_by_a_word_and_nothing_else_with_them() -> None:
    engines: dict[str, Any] = {"prefill": {"engine": {}}, "decode": {"engine": {"quantization": "int4"}}}
    with pytest.raises(ClusterStartError, match=r"use one for both, or set router\.mixed_quantization to true"):
        check_pools_match(config(**engines))
    check_pools_match(config(**engines, router={"mixed_quantization": True}))
    groups = {
        "replicas": 2,
        "groups": {"a": {}, "b": {"engine": {"quantization": "int8", "quantized_groups": ["head"]}}},
    }
    check_pools_match(config(prefill=groups, decode=engines["decode"], router={"mixed_quantization": True}))
    engines["decode"]["engine"]["kv_dtype"] = "int8"
    with pytest.raises(ClusterStartError, match=r"engine\.kv_dtype is model .*use one for both$"):
        check_pools_match(config(**engines, router={"mixed_quantization": True}))


def test_without_a_prefill_pool_nothing_has_to_match() -> None:
    check_pools_match(config(prefill={"replicas": 0, "engine": {"block_tokens": 16}}))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"engine": {"pin_threads": "0"}}, "prefill-0 and of decode-0 to processor 0"),
        ({"decode": {"replicas": 2, "engine": {"pin_threads": "1-2"}}}, "decode-0 and of decode-1 to processor 1"),
    ],
)
def test_no_processor_is_given_to_two_workers(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ClusterStartError, match=named):
        check_processors(config(**sections))


def test_a_pool_each_may_have_its_own_processors() -> None:
    check_processors(config(prefill={"engine": {"pin_threads": "0"}}, decode={"engine": {"pin_threads": "1"}}))
    check_processors(config(engine={"pin_threads": "auto"}))


def test_pools_of_different_degree_exchange_no_digests() -> None:
    several = {"engine": {"tensor_parallel": 2}}
    check_pools_match(config(decode=several))
    check_pools_match(config(prefill=several, decode={"engine": {"tensor_parallel": 4}}))
    with pytest.raises(ClusterStartError, match=r"transport\.digest is of whole blocks, and the ranks of decode"):
        check_pools_match(config(decode=several, transport={"digest": True}))
