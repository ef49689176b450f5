"""A checkpoint as checkpoints are published, in a cluster of real processes: several end tokens, more embeddings than
the tokenizer has tokens, float16, several files, a link to a directory with a space in its name.

The model counts: it answers a token with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diptych.v1 import generate_pb2

from tests.support.checkpoints import counting_model, saved_tokenizer
from tests.support.doors import CHATS, EVERY, TEXTS, Doors
from tests.support.processes import Cluster
from tests.support.raw_http import Http

VOCABULARY = 300


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "a place" / "small llama"
    counting_model(path, vocab_size=VOCABULARY, stored="float16", max_shard_size="60KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    wrapped = saved_tokenizer(path)
    ends = [wrapped.eos_token_id, *wrapped.convert_tokens_to_ids(["=", "Z"])]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


@pytest.fixture(scope="module")
def published(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    link = tmp_path_factory.mktemp("links") / "model"
    link.symlink_to(directory)
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"),
        link,
        engine={"num_blocks": 64, "block_tokens": 16, "dtype": "auto"},
        transport={"digest": True, "ucx_net_devices": "lo"},
        forked=True,
    )
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(published: Cluster) -> Iterator[Cluster]:
    yield published
    published.assert_nothing_left()


@pytest.fixture
def doors(cluster: Cluster) -> Doors:
    return Doors(Http(cluster.http_port), cluster.channel, "model")


@pytest.fixture(scope="module")
def ids(directory: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def test_each_end_token_ends_the_answer_at_every_door(doors: Doors, ids: Any) -> None:
    for door in TEXTS:
        for text, said in (("8", "9:;<"), ("W", "XY")):
            answer = doors.ask(door, text)
            assert (answer.text, answer.finish) == (said, "stop"), door
    for door in CHATS:
        answer = doors.ask(door, "hi")  # the template ends with a colon
        assert (answer.text, answer.finish) == (";<", "stop"), door
    for end in ("Z", "</s>"):
        for door in set(EVERY) - {"ModelInfer"}:
            answer = doors.ask(door, "8", biases={ids.token_to_id(end): 100.0})
            assert (answer.text, answer.finish) == ("", "stop"), door


@pytest.mark.parametrize("placement", [generate_pb2.PLACEMENT_SPLIT, generate_pb2.PLACEMENT_LOCAL])
def test_tokens_that_the_tokenizer_lacks_are_no_text_and_end_nothing(
    cluster: Cluster, ids: Any, placement: int
) -> None:
    known = ids.get_vocab_size()
    assert known < VOCABULARY - 4
    sampling = generate_pb2.SamplingParams(temperature=0, max_tokens=VOCABULARY - known, logprobs=2)
    reply = cluster.ask(cluster.request([known - 2], sampling, placement))
    assert reply.token_ids == [*range(known - 1, VOCABULARY - 1)]
    assert reply.text == ids.decode([known - 1])
    assert reply.finished.reason == generate_pb2.FINISH_REASON_LENGTH
    again = cluster.ask(cluster.request([VOCABULARY - 3], generate_pb2.SamplingParams(max_tokens=9), placement))
    assert again.token_ids == [VOCABULARY - 2, VOCABULARY - 1, 0, 1, 2]  # past the last one comes the first
    assert again.finished.reason == generate_pb2.FINISH_REASON_STOP


def test_formats_leave_out_what_the_tokenizer_lacks(cluster: Cluster, ids: Any) -> None:
    structured = generate_pb2.StructuredOutput(regex="[A-Y]{6}")
    sampling = generate_pb2.SamplingParams(temperature=1, seed=3, max_tokens=20, structured=structured)
    reply = cluster.ask(cluster.request([ids.get_vocab_size()], sampling))
    assert len(reply.text) == 6
    assert max(reply.token_ids) < ids.get_vocab_size()


def test_log_probabilities_name_such_tokens_by_nothing(doors: Doors, ids: Any) -> None:
    prompt = [ids.get_vocab_size()]
    body = {"model": "model", "prompt": prompt, "max_tokens": 2, "temperature": 0, "logprobs": 1}
    found = doors.http.post("/v1/completions", body)
    assert found.status == 200, found
    assert found.json["choices"][0]["logprobs"]["tokens"] == ["", ""]
    assert doors.http.post("/detokenize", {"tokens": prompt}).json == {"prompt": ""}


def test_it_runs_as_it_was_stored(cluster: Cluster) -> None:
    assert all("float16" in worker.device for worker in cluster.cluster().workers)
