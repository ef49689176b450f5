"""Routers by a name that stands for all of them."""

from __future__ import annotations

import pytest

from deploy.config import ClusterConfig
from deploy.run_one import RoutersByName, of_worker
from settings.file import SettingsError


def test_routers_come_and_go_and_a_name_that_fails_keeps_what_was_known() -> None:
    answers: list[list[str] | OSError] = [["10.0.0.1:8101"], OSError("planted"), [], ["10.0.0.1:8101", "10.0.0.2:8101"]]
    asked = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    routers = RoutersByName("diptych-routers:8101", resolve)
    routers.stop()
    assert routers.addresses() == ["10.0.0.1:8101"]
    for expected in (["10.0.0.1:8101"], ["10.0.0.1:8101"], ["10.0.0.1:8101", "10.0.0.2:8101"]):
        routers.once()
        assert routers.addresses() == expected
    assert set(asked) == {("diptych-routers", 8101)}


def test_a_worker_that_listens_everywhere_says_where_it_is() -> None:
    everywhere = ClusterConfig.model_validate({"worker": {"host": "0.0.0.0"}})
    assert of_worker(everywhere, "decode", "10.0.0.7").worker.advertise_host == "10.0.0.7"
    named = ClusterConfig.model_validate({"worker": {"host": "0.0.0.0", "advertise_host": "a.example.com"}})
    assert of_worker(named, "decode", "10.0.0.7").worker.advertise_host == "a.example.com"
    assert of_worker(ClusterConfig(), "decode", "10.0.0.7").worker.advertise_host == ""


def test_a_worker_that_could_not_share_kv_with_the_rest_of_its_file_is_refused() -> None:
    file: dict[str, object] = {"decode": {"groups": {"a": {"engine": {"block_tokens": 64}, "replicas": 0}, "b": {}}}}
    config = ClusterConfig.model_validate(file)
    of_worker(config, "decode", "", "b")  # there is nobody in the other group
    with pytest.raises(SettingsError, match=r"block_tokens is \d+ for prefill and 64 for decode/a"):
        of_worker(config, "decode", "", "a")
