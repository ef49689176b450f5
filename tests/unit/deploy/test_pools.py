"""Groups of a pool in cluster.yaml: what they inherit, what is refused, how each is deployed and scaled."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import yaml
from rich.console import Console

from deploy.cluster_up import check_pools_match, check_processors, check_reserved_gpus, running_cluster
from deploy.config import ClusterConfig
from deploy.pools import placing, role_of
from deploy.progress import Stages
from deploy.ray_cluster import ClusterStartError
from deploy.serve_platform import counts_to_deploy, deployment_of, home_of
from settings.file import SettingsError, validate_settings

TWO = """
prefill: {replicas: 2, num_gpus: 1, engine: {max_batch_tokens: 4096}}
decode:
  num_gpus: 1
  surge: 0
  engine: {max_batch_tokens: 256, max_running_sequences: 64}
  worker: {drain_s: 90}
  groups:
    h200: {replicas: 4}
    h100: {replicas: 2, num_gpus: 2, surge: 1, engine: {tensor_parallel: 2, max_running_sequences: 32}}
"""


def config(text: str, **more: Any) -> ClusterConfig:
    return validate_settings({**yaml.safe_load(text), **more}, ClusterConfig, "test")


def test_groups_take_from_their_pool_what_they_do_not_say() -> None:
    cluster = config(TWO)
    assert cluster.decode.replicas == 6
    assert [group.home for group in cluster.groups] == ["prefill", "decode/h200", "decode/h100", "standby"]
    h200, h100 = cluster.group("decode", "h200"), cluster.group("decode", "h100")
    assert (h200.replicas, h200.num_gpus, h200.surge) == (4, 1.0, 0)
    assert (h100.replicas, h100.num_gpus, h100.surge) == (2, 2.0, 1)
    engines = [cluster.settings_of(group).engine for group in (h200, h100)]
    assert [(e.tensor_parallel, e.max_batch_tokens, e.max_running_sequences) for e in engines] == [
        (1, 256, 64),
        (2, 256, 32),
    ]
    settings = cluster.worker_settings("decode", "h100")
    assert (settings.worker.group, settings.worker.drain_s) == ("h100", 90)
    assert cluster.worker_settings("prefill").worker.group == ""


def test_what_serve_is_given_is_read_as_it_was_written() -> None:
    cluster = config(TWO)
    assert ClusterConfig.model_validate(cluster.model_dump(mode="json")) == cluster


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode: {replicas: 3, groups: {a: {}, b: {}}}", "replicas is 3, and its groups have 2 together; leave it"),
        ("decode: {groups: {A: {}}}", "decode.groups.A"),
        ("decode: {groups: {a: {replicas: -1}}}", "decode.groups.a.replicas"),
        ("decode: {groups: {a: {num_gpu: 1}}}", "decode.groups.a.num_gpu: unknown key; did you mean num_gpus?"),
        ("decode: {groups: {a: {groups: {b: {}}}}}", "decode.groups.a.groups: unknown key"),
        ("decode: {groups: {a: 3}}", "decode.groups.a"),
        ("scaling: {budget_gpus: 8}\ndecode: {groups: {a: {}, b: {}}}", "set scaling.decode.group to one of a, b"),
        ("scaling: {budget_gpus: 8, decode: {group: c}}\ndecode: {groups: {a: {}}}", "no such group; known here: a"),
        ("scaling: {budget_gpus: 8, decode: {group: a}}", "decode has no groups; leave it out"),
        ("scaling: {budget_gpus: 8, idle_s: 9, decode: {group: a}}\ndecode: {groups: {a: {}}}", "idle_s"),
        ("scaling: {budget_gpus: 8, decode: {group: a, max: 2}}\ndecode: {groups: {a: {}, b: {replicas: 2}}}", "max"),
        (
            "scaling: {budget_gpus: 8, decode: {group: a}}\ndecode: {groups: {a: {}, b: {num_gpus: 2}}}",
            "a worker of decode.groups.b holds 2 GPUs and one of decode.groups.a 1, so a role",
        ),
        (
            "scaling: {budget_gpus: 8, standbys: 1}\nstandby: {groups: {a: {}}}",
            "standby has groups, and scaling starts and stops standbys",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_fix(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words.replace("?", r"\?")):
        config(text)


def test_counts_in_words_are_counted_as_numbers_are() -> None:
    cluster = config("{}", decode={"groups": {"a": {"replicas": "2"}, "b": {"replicas": 3}}})
    assert (cluster.decode.replicas, [group.replicas for group in cluster.groups if group.name]) == (5, [2, 3])
    with pytest.raises(SettingsError, match="replicas is 3, and its groups have 2 together"):
        config("{}", decode={"replicas": 3, "groups": {"a": {"replicas": "2"}}})
    nobody = config("{}", decode={"groups": {"a": {"replicas": "0"}}})
    assert nobody.decode.replicas == 0
    check_pools_match(nobody)  # prefill alone: there is nobody to differ from


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (
            "{groups: {a: {worker: {group: zzz}}}}",
            r"groups\.a\.worker\.group is zzz, and workers of a group are called",
        ),
        ("{worker: {group: zzz}, groups: {a: }}", r"decode: worker\.group is zzz"),
    ],
)
def test_workers_of_a_group_are_called_after_it(pool: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        config(f"decode: {pool}")
    assert config("worker: {group: all}\ndecode: {groups: {a: }}").worker_settings("decode", "a").worker.group == "a"


def test_an_empty_section_of_a_group_has_its_defaults() -> None:
    assert config("decode: {groups: {a: , b: {engine: }}}") == config("decode: {groups: {a: {}, b: {}}}")


def test_a_group_that_is_not_there_is_named_with_those_that_are() -> None:
    for name in ("h300", ""):
        with pytest.raises(SettingsError, match="known here: h200, h100"):
            config(TWO).worker_settings("decode", name)
    with pytest.raises(SettingsError, match="prefill has no groups"):
        config(TWO).worker_settings("prefill", "h200")


def test_a_bad_override_names_its_group() -> None:
    with pytest.raises(SettingsError, match=r"decode\.groups\.a: engine\.blok_tokens: unknown key"):
        config("decode: {groups: {a: {engine: {blok_tokens: 1}}}}").worker_settings("decode", "a")


def test_groups_must_be_able_to_share_kv() -> None:
    check_pools_match(config(TWO))
    cluster = config("decode: {groups: {a: {}, b: {engine: {block_tokens: 64}}}}")
    with pytest.raises(ClusterStartError, match=r"block_tokens is 64 for decode/b and \d+ for prefill|decode/b"):
        check_pools_match(cluster)
    with pytest.raises(ClusterStartError, match="the ranks of decode/h100 workers"):
        check_pools_match(config(TWO, transport={"digest": True}))


@pytest.mark.parametrize("use_ray", [True, False])
@pytest.mark.parametrize("address", ["", "127.0.0.1:1"])
def test_a_cluster_whose_groups_could_not_share_kv_is_not_started(use_ray: bool, address: str) -> None:
    """Nor in a Ray that is joined, whose machines may have what this one has not."""
    cluster = config("decode: {groups: {a: {engine: {block_tokens: 64}}, b: {}}}", ray={"address": address})
    starting = running_cluster(cluster, use_ray=use_ray, say=Stages(Console(quiet=True)), timeout_s=1)
    with pytest.raises(ClusterStartError, match=r"block_tokens is \d+ for prefill and 64 for decode/a"), starting:
        pass


def test_two_groups_do_not_bind_threads_to_one_processor() -> None:
    text = "decode: {engine: {pin_threads: '0'}, groups: {a: {}, b: {}}}"
    with pytest.raises(ClusterStartError, match="of decode-a-0 and of decode-b-0 to processor 0"):
        check_processors(config(text))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"num_gpus": 2, "engine": {"tensor_parallel": 4}}, "decode.num_gpus is 2 and its engine.tensor_parallel is 4"),
        ({"engine": {"tensor_parallel": 2, "device": "cuda"}}, "decode.num_gpus is 0"),
        ({"groups": {"a": {"num_gpus": 1, "engine": {"tensor_parallel": 2}}}}, "decode.groups.a.num_gpus is 1 .* to 2"),
        ({"num_gpus": 4, "engine": {"tensor_parallel": 4}}, None),
        ({"engine": {"tensor_parallel": 2}}, None),  # no GPU is seen: on CPU
        ({"num_gpus": 1, "engine": {"tensor_parallel": 2, "device": "cpu"}}, None),
        ({"num_gpus": 0.5}, None),
    ],
)
def test_every_rank_needs_a_gpu_of_its_own(group: dict[str, Any], words: str | None) -> None:
    refused = contextlib.nullcontext() if words is None else pytest.raises(ClusterStartError, match=words)
    with refused:
        check_reserved_gpus(config("{}", decode=group))


def test_deployments_have_names_that_say_who_is_in_them() -> None:
    for home, name in (("decode", "DecodeWorker"), ("prefill/a-b", "PrefillWorker-a-b"), ("standby", "StandbyWorker")):
        assert (deployment_of(home), home_of(name)) == (name, home)
        assert role_of(home) == home.split("/")[0]
    assert home_of("Router") is home_of("Scaler") is home_of("Router-a") is None


def test_the_ranks_of_a_replica_are_placed_together() -> None:
    """In one bundle: the replica's process sees what is reserved for all of its ranks."""
    cluster = config(TWO.replace("h100: {", "h100: {num_cpus: 8, resources: {fast: 1}, "))
    alone, ranks = cluster.group("decode", "h200"), cluster.group("decode", "h100")
    assert placing(alone, 1) == {"ray_actor_options": {"num_cpus": 0, "num_gpus": 1, "resources": {}}}
    options = placing(ranks, 2)
    assert options["ray_actor_options"] == {"num_cpus": 8, "num_gpus": 2, "resources": {"fast": 1}}
    assert options["placement_group_bundles"] == [{"CPU": 8, "GPU": 2, "fast": 1}]
    assert options["placement_group_strategy"] == "STRICT_PACK"
    assert "placement_group_bundles" not in placing(cluster.group("prefill"), 1)
    nothing = config("decode: {engine: {tensor_parallel: 2}}").group("decode")
    assert "placement_group_bundles" not in placing(nothing, 2)  # Ray has no empty bundles


SCALED = """
scaling: {budget_gpus: 12, shift_roles: false, decode: {group: h200}}
decode: {num_gpus: 1, groups: {h200: {replicas: 2}, h100: {replicas: 2, num_gpus: 2}}}
"""


def test_the_policy_knows_of_the_groups_that_stay() -> None:
    """Two workers of two GPUs stay: never fewer than those and one more, and their second GPUs are spent."""
    cluster = config(SCALED)
    scaling = cluster.scaling_of_groups()
    assert cluster.gpus_of_workers == (1.0, 1.0)
    assert (scaling.decode.min, scaling.prefill.min, scaling.budget_gpus) == (3, 1, 10)
    assert config("scaling: {budget_gpus: 3}").scaling_of_groups() == config("scaling: {budget_gpus: 3}").scaling


def test_the_cluster_that_begins_must_be_within_the_budget_whatever_its_groups_hold() -> None:
    with pytest.raises(SettingsError, match="the workers that the cluster starts with need 7"):
        config(SCALED.replace("budget_gpus: 12", "budget_gpus: 6"))


def test_only_the_scaled_group_is_deployed_as_the_scaler_left_it() -> None:
    cluster = config(SCALED)
    configured = {"prefill": 1, "decode/h200": 2, "decode/h100": 2, "standby": 0}
    assert counts_to_deploy(cluster, lambda _: "") == configured
    told = f'{{"configured": {str(configured).replace(chr(39), chr(34))}, "counts": {{"decode/h200": 5}}}}'
    assert counts_to_deploy(cluster, lambda _: told) == {**configured, "decode/h200": 5}
    none = config(SCALED.replace("h200: {replicas: 2}", "h200: {replicas: 0}"))
    assert counts_to_deploy(none, lambda _: "")["decode/h200"] == 1
