from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoint.generation import SamplingDefaults
from grammar.structured import Kind, Structured
from router.access.rate_limit import TokensLeft
from router.admission import RawRequest, RawSampling, ServedModel, admit, another, check_before_tokenizing, tokenized
from router.config import RouterConfig
from router.errors import Code, RequestRefused
from router.request import Beams, Request, Sampling
from router.text.chat import Chat, ChatMessage

CONFIG = RouterConfig(max_prompt_bytes=1000)
MODEL = ServedModel("m", 100, 64, frozenset([2]))
TEXT = RawRequest(text="hello")
FORMAT = Structured(Kind.REGEX, "a+")


def sampling(**values: object) -> RawRequest:
    return replace(TEXT, sampling=RawSampling(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "code", "field", "words"),
    [
        (RawRequest(), Code.INVALID_ARGUMENT, "prompt", "no prompt"),
        (RawRequest(text=""), Code.INVALID_ARGUMENT, "text", "empty"),
        (RawRequest(token_ids=[]), Code.INVALID_ARGUMENT, "token_ids", "empty"),
        (RawRequest(chat=Chat([])), Code.INVALID_ARGUMENT, "chat", "no messages"),
        (RawRequest(chat=Chat([ChatMessage("", "hi")])), Code.INVALID_ARGUMENT, "chat", "no role"),
        (RawRequest(text="x" * 1001), Code.INVALID_ARGUMENT, "prompt", "1001 bytes, the limit is 1000"),
        (RawRequest(token_ids=[1] * 251), Code.INVALID_ARGUMENT, "prompt", "1004 bytes"),
        (replace(TEXT, model="other"), Code.NOT_FOUND, "model", "served is 'm'"),
        (replace(TEXT, emitted_token_ids=[1] * 64), Code.INVALID_ARGUMENT, "emitted_token_ids", "context limit is 64"),
        (replace(TEXT, priority=101), Code.INVALID_ARGUMENT, "priority", "-100..100"),
        (replace(TEXT, request_id="x" * 257), Code.INVALID_ARGUMENT, "request_id", "1 to 256 bytes"),
        (replace(TEXT, request_id="a\nb"), Code.INVALID_ARGUMENT, "request_id", "printable ASCII"),
        (replace(TEXT, request_id="größer"), Code.INVALID_ARGUMENT, "request_id", "printable ASCII"),
        (sampling(max_tokens=0), Code.INVALID_ARGUMENT, "max_tokens", "at least one"),
        (sampling(temperature=-0.1), Code.INVALID_ARGUMENT, "temperature", "[0, 100]"),
        (sampling(temperature=float("nan")), Code.INVALID_ARGUMENT, "temperature", "[0, 100]"),
        (sampling(temperature=float("inf")), Code.INVALID_ARGUMENT, "temperature", "[0, 100]"),
        (sampling(top_p=0.0), Code.INVALID_ARGUMENT, "top_p", "(0, 1]"),
        (sampling(top_p=1.1), Code.INVALID_ARGUMENT, "top_p", "(0, 1]"),
        (sampling(top_k=1 << 31), Code.INVALID_ARGUMENT, "top_k", "[0, 2147483647]"),
        (sampling(top_k=(1 << 32) - 1), Code.INVALID_ARGUMENT, "top_k", "where 0 is off"),
        (sampling(min_p=-0.1), Code.INVALID_ARGUMENT, "min_p", "[0, 1]"),
        (sampling(temperature=1e300), Code.INVALID_ARGUMENT, "temperature", "[0, 100]"),
        (sampling(temperature=100.1), Code.INVALID_ARGUMENT, "temperature", "[0, 100]"),
        (sampling(repetition_penalty=0.0), Code.INVALID_ARGUMENT, "repetition_penalty", "[0.01, 100]"),
        (sampling(repetition_penalty=1e-38), Code.INVALID_ARGUMENT, "repetition_penalty", "[0.01, 100]"),
        (sampling(repetition_penalty=1e38), Code.INVALID_ARGUMENT, "repetition_penalty", "[0.01, 100]"),
        (sampling(presence_penalty=2.1), Code.INVALID_ARGUMENT, "presence_penalty", "[-2, 2]"),
        (sampling(frequency_penalty=float("nan")), Code.INVALID_ARGUMENT, "frequency_penalty", "[-2, 2]"),
        (sampling(logprobs=21), Code.INVALID_ARGUMENT, "logprobs", "at most 20"),
        (sampling(stop=("x",) * 17), Code.INVALID_ARGUMENT, "stop", "limit is 16"),
        (sampling(stop_token_ids=(1,) * 1025), Code.INVALID_ARGUMENT, "stop_token_ids", "limit is 1024"),
        (RawRequest(chat=Chat([ChatMessage("user")] * 4097)), Code.INVALID_ARGUMENT, "chat", "4097 chat messages"),
        (RawRequest(chat=Chat([ChatMessage("u" * 65, "hi")])), Code.INVALID_ARGUMENT, "chat", "role is longer than 64"),
        (replace(TEXT, model="m" * 10_000), Code.NOT_FOUND, "model", "mmm...' is not served"),
        (sampling(stop=("x" * 1025,)), Code.INVALID_ARGUMENT, "stop", "longer than 1024"),
        (sampling(logit_bias={1: 100.5}), Code.INVALID_ARGUMENT, "logit_bias", "[-100, 100]"),
        (sampling(logit_bias={1: float("nan")}), Code.INVALID_ARGUMENT, "logit_bias", "[-100, 100]"),
        (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), Code.INVALID_ARGUMENT, "logit_bias", "limit is 1024"),
        (sampling(allowed_token_ids=(1,) * 4097), Code.INVALID_ARGUMENT, "allowed_token_ids", "limit is 4096"),
        (sampling(bad_words=("x",) * 257), Code.INVALID_ARGUMENT, "bad_words", "limit is 256"),
        (sampling(bad_words=("x", " ")), Code.INVALID_ARGUMENT, "bad_words", "no text"),
        (sampling(bad_words=("é" * 9000,)), Code.INVALID_ARGUMENT, "bad_words", "16384 bytes"),
        (sampling(bad_words=("x",), structured=FORMAT), Code.INVALID_ARGUMENT, "bad_words", "leave one of them out"),
        (sampling(allowed_token_ids=(1,), structured=FORMAT), Code.INVALID_ARGUMENT, "allowed_token_ids", "leave one"),
        (sampling(structured=Structured(Kind.REGEX)), Code.INVALID_ARGUMENT, "structured", "regex of"),
        (sampling(structured=Structured(Kind.CHOICE)), Code.INVALID_ARGUMENT, "structured", "at least one option"),
        (sampling(structured=Structured(Kind.REGEX, "(" * 200)), Code.INVALID_ARGUMENT, "structured", "nests 200"),
        (
            sampling(structured=Structured(Kind.LARK, "x" * 300_000)),
            Code.INVALID_ARGUMENT,
            "structured",
            "limit is 2621",
        ),
    ],
)
def test_bad_input_is_refused_with_cause_and_fix(raw: RawRequest, code: Code, field: str, words: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        check_before_tokenizing(raw, CONFIG, MODEL)
    failure = refused.value.failure
    assert (failure.code, failure.field) == (code, field)
    assert words in failure.message


def admitted(raw: RawRequest, prompt: list[int], deadline_s: float | None = None):
    return admit(raw, prompt, CONFIG, MODEL, 5.0, deadline_s, "r", random.Random(0))


@pytest.mark.parametrize(
    ("raw", "prompt", "words"),
    [
        (TEXT, [], "no tokens"),
        (TEXT, [100], "vocabulary of 100"),
        (TEXT, [1] * 64, "64 tokens and the context limit is 64"),
        (sampling(max_tokens=10), [1] * 60, "at most 4"),
        (sampling(max_tokens=3, min_tokens=4), [1], "min_tokens"),
        (sampling(stop_token_ids=(100,)), [1], "vocabulary"),
        (replace(sampling(max_tokens=2), emitted_token_ids=[1, 2, 3]), [1], "more than max_tokens"),
        (replace(TEXT, emitted_token_ids=[100]), [1], "vocabulary of 100"),
        (sampling(logit_bias={100: 1.0}), [1], "vocabulary"),
        (sampling(allowed_token_ids=(5, 100)), [1], "vocabulary"),
        (sampling(allowed_token_ids=(-1,)), [1], "vocabulary"),
        (replace(sampling(allowed_token_ids=(5, 6)), bad_words=((5,), (6,))), [1], "allow another token"),
        (sampling(allowed_token_ids=(2,), min_tokens=1), [1], "leave min_tokens out"),
    ],
)
def test_what_only_tokens_show_is_refused_too(raw: RawRequest, prompt: list[int], words: str) -> None:
    with pytest.raises(RequestRefused, match=words):
        admitted(raw, prompt)


def test_defaults_are_resolved() -> None:
    request = admitted(TEXT, [1, 2])
    s = request.sampling
    assert (s.temperature, s.top_p, s.max_tokens, s.stop_token_ids) == (0.0, 1.0, 62, (2,))
    assert request.deadline == 5.0 + CONFIG.default_deadline_s
    assert admitted(sampling(ignore_eos=True), [1]).sampling.stop_token_ids == ()
    assert admitted(sampling(stop=("", "x", "")), [1]).sampling.stop == ("x",)
    assert admitted(sampling(seed=0), [1]).sampling.seed == 0
    assert admitted(sampling(logit_bias={7: -1.5, 3: 2.0, 4: 0.0}), [1]).sampling.logit_bias == ((3, 2.0), (7, -1.5))


def test_of_a_prompt_that_is_cut_the_end_is_kept() -> None:
    def kept(limit: int, **values: object) -> int:
        request = admitted(replace(sampling(**values), truncate_prompt_tokens=limit), list(range(90)))
        assert list(request.prompt) == list(range(90))[-len(request.prompt) :]
        return len(request.prompt)

    assert kept(10) == 10
    assert kept(-1, max_tokens=4) == 60
    assert kept(-1) == 32, "half of the context is left for an answer of any length"
    assert kept(-1, default_max_tokens=16) == 48
    with pytest.raises(RequestRefused, match="64 tokens and the context limit is 64"):
        kept(64)
    with pytest.raises(RequestRefused, match="context limit"):
        kept(-1, max_tokens=64)
    for limit in (0, -2):
        with pytest.raises(RequestRefused, match="how many tokens to keep"):
            check_before_tokenizing(replace(TEXT, truncate_prompt_tokens=limit), CONFIG, MODEL)


def test_text_that_cannot_be_kept_is_not_tokenized() -> None:
    tokenizer: Any = SimpleNamespace(encode=lambda text, **_: [ord(c) for c in text], front_tokens=0)
    model, long = replace(MODEL, longest_text_chars=6), RawRequest(text="abcd" * 50)
    with pytest.raises(RequestRefused, match="shorten it"):
        check_before_tokenizing(long, CONFIG, model)
    raw = replace(long, truncate_prompt_tokens=3)
    check_before_tokenizing(raw, CONFIG, model)
    _, prompt = tokenized(raw, tokenizer, model)
    assert list(prompt) == [ord(c) for c in "cdabcd"]
    chat = Chat([ChatMessage("user", "abcdefgh")])
    with pytest.raises(RequestRefused, match="shorten it"):
        check_before_tokenizing(RawRequest(chat=chat, truncate_prompt_tokens=3), CONFIG, model)


def test_text_is_cut_to_what_is_kept_and_not_to_what_fits() -> None:
    tokenizer: Any = SimpleNamespace(encode=lambda text, **_: [1, *(ord(c) for c in text)], front_tokens=1)
    model = replace(MODEL, context_limit_tokens=1000, longest_text_chars=2000)
    for kept, most in ((3, 135), (-1, 2001), (999, 2001)):
        raw, prompt = tokenized(RawRequest(text="abcd" * 5000, truncate_prompt_tokens=kept), tokenizer, model)
        assert len(prompt) == most
        assert raw.front_tokens == 1


def test_what_a_tokenizer_puts_in_front_is_kept() -> None:
    raw = replace(TEXT, truncate_prompt_tokens=3, front_tokens=1)
    assert list(admitted(raw, [1, 5, 6, 7, 8]).prompt) == [1, 7, 8]
    assert list(admitted(raw, [1, 5, 6]).prompt) == [1, 5, 6]
    assert list(admitted(replace(raw, truncate_prompt_tokens=1), [1, 5, 6]).prompt) == [6]


def test_a_cut_prompt_does_not_hold_the_whole_of_it() -> None:
    whole: Any = np.arange(50, dtype=np.uint32)
    for front in (0, 1):
        prompt: Any = admitted(replace(TEXT, truncate_prompt_tokens=3, front_tokens=front), whole).prompt
        assert prompt.dtype == np.uint32
        assert not np.shares_memory(prompt, whole)


def test_bad_words_are_tokenized_once_and_not_as_a_short_text() -> None:
    raw = sampling(bad_words=("seventh",) * 256)
    assert raw.size_words > 4096
    assert replace(raw, bad_words=()).size_words == 0
    no_tokenizer: Any = SimpleNamespace(encode=lambda text, **_: [7])
    assert tokenized(replace(raw, bad_words=((7,),)), no_tokenizer, MODEL)[0].bad_words == ((7,),)
    first = admitted(replace(sampling(allowed_token_ids=(9, 5)), bad_words=((7,),)), [1])
    further = replace(raw, first=first, token_ids=[1], text=None)
    assert further.size_words == 0
    again = admitted(tokenized(further, no_tokenizer, MODEL)[0], [1]).sampling
    assert again.bad_words == ((7,),)
    assert again.allowed_token_ids is first.sampling.allowed_token_ids


def test_further_answers_share_the_prompt_of_the_first() -> None:
    no_tokenizer: Any = None
    asked = replace(
        TEXT, text=None, token_ids=range(40), truncate_prompt_tokens=-1, sampling=RawSampling(max_tokens=30)
    )
    raw, prompt = tokenized(asked, no_tokenizer, MODEL)
    first = admit(raw, prompt, CONFIG, MODEL, 5.0, None, "r", random.Random(0))
    assert len(first.prompt) == 34
    narrower = replace(MODEL, context_limit_tokens=64 - 1)  # as other workers have come
    raw, prompt = tokenized(another(asked, 1, first), no_tokenizer, narrower)
    assert prompt is first.prompt
    with pytest.raises(RequestRefused, match="ask for at most 29"):
        admit(raw, prompt, CONFIG, narrower, 5.0, None, "r", random.Random(0))
    assert admit(raw, prompt, CONFIG, MODEL, 5.0, None, "r", random.Random(0)).prompt is first.prompt


SQL, OLD_SQL, NEW_SQL, POET = "a" * 32, "b" * 32, "c" * 32, "d" * 32
ADAPTED = replace(
    MODEL, aliases=("m", "alias"), adapters={"sql": SQL, "poet": POET}, older={"sql": frozenset({OLD_SQL, NEW_SQL})}
)


def resumed(model: str, revision: str, emitted: tuple[int, ...] = (5,), served: ServedModel = ADAPTED) -> Request:
    raw = replace(TEXT, model=model, emitted_token_ids=emitted, revision=revision)
    return admit(raw, [1], CONFIG, served, 5.0, None, "r", random.Random(0))


@pytest.mark.parametrize(
    ("model", "adapter"),
    [("", ""), ("m", ""), ("alias", ""), ("sql", SQL), ("sql", OLD_SQL), ("sql", NEW_SQL), ("poet", POET)],
)
@pytest.mark.parametrize("revision", ["w/bfloat16", ""])
def test_an_answer_goes_on_with_its_adapter(model: str, adapter: str, revision: str) -> None:
    begun = Request("r", [1], Sampling(8), 0.0, 60.0, revision=revision, adapter=adapter)
    if begun.answered_by:
        request = resumed(model, begun.answered_by)
        assert (request.revision, request.adapter, request.answered_by) == (revision, adapter, begun.answered_by)


@pytest.mark.parametrize(
    ("model", "revision", "code", "words"),
    [
        ("sql", "w/f", Code.INVALID_ARGUMENT, "began on the model alone, and the request is for the adapter 'sql'"),
        ("sql", "w/f#", Code.INVALID_ARGUMENT, "began on the model alone"),
        ("m", f"w/f#{SQL}", Code.INVALID_ARGUMENT, "began on an adapter, and the request is for the model alone"),
        ("", f"w/f#{OLD_SQL}", Code.INVALID_ARGUMENT, "began on an adapter"),
        ("alias", f"#{POET}", Code.INVALID_ARGUMENT, "began on an adapter"),
        ("sql", f"w/f#{POET}", Code.UNAVAILABLE, "no worker that is known here has the adapter 'sql'"),
        ("poet", f"w/f#{OLD_SQL}", Code.UNAVAILABLE, "no worker that is known here has the adapter 'poet'"),
        ("sql", f"w/f#{SQL}#", Code.UNAVAILABLE, "no worker that is known here"),
    ],
)
def test_a_name_is_no_way_to_another_model(model: str, revision: str, code: Code, words: str) -> None:
    """A key is asked for the name alone."""
    with pytest.raises(RequestRefused) as refused:
        resumed(model, revision)
    assert (refused.value.failure.code, refused.value.failure.field) == (code, "revision")
    assert words in refused.value.failure.message


@pytest.mark.parametrize("emitted", [(), (5,)])
def test_an_adapter_that_is_gone_after_a_sleep_is_not_the_model_alone(emitted: tuple[int, ...]) -> None:
    with pytest.raises(RequestRefused, match="'sql' is not served here") as refused:
        resumed("sql", "w/f", emitted, served=replace(ADAPTED, adapters={}, older={}))
    assert refused.value.failure.code is Code.NOT_FOUND


def test_an_answer_goes_on_where_its_chat_does() -> None:
    chat = RawRequest(chat=Chat([ChatMessage("assistant", "Well, I")], continue_final=True))
    first = admitted(chat, [1])
    assert first.sampling.goes_on
    assert admitted(replace(chat, chat=None, token_ids=[1], first=first), [1]).sampling.goes_on
    assert not admitted(replace(chat, chat=Chat([ChatMessage("user", "hi")])), [1]).sampling.goes_on


def test_masks_are_for_workers_that_know_them() -> None:
    raw = replace(sampling(allowed_token_ids=(9, 5, 9), bad_words=("x",)), bad_words=((7,), (5, 7)))
    request = admitted(raw, [1])
    assert (request.sampling.allowed_token_ids, request.sampling.bad_words) == ((5, 9), ((7,), (5, 7)))
    old = replace(MODEL, masks_tokens=False)
    for one in (raw, replace(raw, sampling=RawSampling())):
        with pytest.raises(RequestRefused, match="older version") as refused:
            admit(one, [1], CONFIG, old, 5.0, None, "r", random.Random(0))
        assert refused.value.failure.code is Code.UNAVAILABLE
    assert admit(TEXT, [1], CONFIG, old, 5.0, None, "r", random.Random(0)).sampling.bad_words == ()


def test_log_probabilities_of_a_prompt_are_bounded_and_given_once() -> None:
    raw = sampling(prompt_logprobs=3, max_tokens=0)
    request = admitted(raw, [1, 2])
    assert (request.sampling.prompt_logprobs, request.sampling.max_tokens) == (3, 0)
    assert request.needs_whole_prompt
    assert admitted(replace(raw, first=request), [1, 2]).sampling.prompt_logprobs is None
    long = replace(MODEL, context_limit_tokens=1 << 17)
    asked = {"config": CONFIG, "model": long, "now": 5.0, "grpc_deadline_s": None, "request_id": "r"}
    assert admit(raw, [1] * (1 << 15), **asked, rng=random.Random(0)).sampling.prompt_logprobs == 3  # type: ignore
    with pytest.raises(RequestRefused, match="131076 log-probabilities, the limit is 131072") as refused:
        admit(raw, [1] * ((1 << 15) + 1), **asked, rng=random.Random(0))  # type: ignore[arg-type]
    assert refused.value.failure.field == "prompt_logprobs"
    old = replace(MODEL, scores_prompts=False)
    with pytest.raises(RequestRefused, match="older version") as refused:
        admit(raw, [1], CONFIG, old, 5.0, None, "r", random.Random(0))
    assert refused.value.failure.code is Code.UNAVAILABLE
    assert admit(TEXT, [1], CONFIG, old, 5.0, None, "r", random.Random(0)).sampling.prompt_logprobs is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"frequency_penalty": -1.0}, "frequency_penalty"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": (3,)}, "allowed_token_ids"),
        ({"bad_words": ("x",)}, "bad_words"),
        ({"stop": ("x",)}, "stop"),
        ({"structured": FORMAT}, "structured"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"stop_token_ids": tuple(range(64))}, "stop_token_ids"),
        ({"beams": Beams(2, 1, float("inf"))}, "length_penalty"),
    ],
)
def test_what_a_beam_search_does_not_go_by_is_refused(changes: dict[str, Any], field: str) -> None:
    harmless = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": ("",), "min_tokens": 1, "beams": Beams(4, 2)}
    check_before_tokenizing(sampling(**harmless), CONFIG, MODEL)
    with pytest.raises(RequestRefused) as refused:
        check_before_tokenizing(sampling(**harmless | changes), CONFIG, MODEL)
    assert refused.value.failure.field == field
    assert refused.value.failure.code is Code.INVALID_ARGUMENT


def test_beams_of_a_model_whose_workers_do_not_know_them_or_of_a_resumed_answer() -> None:
    raw = sampling(beams=Beams(4, 2))
    with pytest.raises(RequestRefused, match="older version"):
        check_before_tokenizing(raw, CONFIG, replace(MODEL, searches_beams=False))
    with pytest.raises(RequestRefused, match="not resumed"):
        check_before_tokenizing(replace(raw, emitted_token_ids=(1,)), CONFIG, MODEL)
    defaults = replace(MODEL, sampling=SamplingDefaults(temperature=0.7, repetition_penalty=1.1))
    asked = admit(raw, [1], CONFIG, defaults, 5.0, None, "r", random.Random(0)).sampling.searching
    assert (asked.temperature, asked.repetition_penalty) == (0.0, 1.0), "the model's own do not apply"


def test_without_an_answer_the_prompt_may_fill_the_context() -> None:
    whole = [1] * MODEL.context_limit_tokens
    assert len(admitted(sampling(prompt_logprobs=0, max_tokens=0), whole).prompt) == MODEL.context_limit_tokens
    for raw in (sampling(prompt_logprobs=0, max_tokens=1), sampling(prompt_logprobs=0)):
        with pytest.raises(RequestRefused, match="shorten it"):
            admitted(raw, whole)
    with pytest.raises(RequestRefused, match="max_tokens is 0"):
        check_before_tokenizing(sampling(max_tokens=0), CONFIG, MODEL)


def test_a_resumed_answers_defaults_are_those_of_the_first_time() -> None:
    first, resumed = admitted(TEXT, [1, 2]), admitted(replace(TEXT, emitted_token_ids=[5, 6]), [1, 2])
    assert resumed.emitted == (5, 6)
    assert resumed.sampling.max_tokens == first.sampling.max_tokens


def test_what_float32_would_make_something_else_of_is_taken_for_what_it_means() -> None:
    for value in (1e-300, 1e-45, 9e-6):
        assert admitted(sampling(temperature=value), [1]).sampling.temperature == 0.0
        assert admitted(sampling(top_p=max(value / 10, 1e-300)), [1]).sampling.top_p == 1e-6
    assert admitted(sampling(temperature=1e-5, top_p=1e-5), [1]).sampling.temperature == 1e-5
    for value in (0.01, float(np.float32(0.01)), 100.0):  # the same bound at every door
        check_before_tokenizing(sampling(repetition_penalty=value), CONFIG, MODEL)


def test_the_tightest_deadline_holds() -> None:
    raw = replace(TEXT, deadline_ms=2000)
    assert admitted(raw, [1]).deadline == 7.0
    assert admitted(raw, [1], deadline_s=1.0).deadline == 6.0
    assert admitted(TEXT, [1], deadline_s=3.0).deadline == 8.0


def default_of(raw: RawRequest, prompt: int, left: TokensLeft | None) -> int:
    request = admit(raw, [1] * prompt, CONFIG_16, WIDE, 5.0, None, "r", random.Random(0), left=left)
    return request.sampling.max_tokens


CONFIG_16 = RouterConfig(default_max_tokens=16)
WIDE = ServedModel("m", 100, 1000, frozenset([2]))
CHAT_DOOR = sampling(fill_context=True)
FIRST = admit(TEXT, [1] * 50, CONFIG_16, WIDE, 5.0, None, "r", random.Random(0))


@pytest.mark.parametrize(
    ("raw", "left", "expected"),
    [
        (TEXT, None, 16),
        (CHAT_DOOR, None, 950),
        (sampling(default_max_tokens=7), None, 7),
        (sampling(default_max_tokens=7, most_by_default=5), None, 5),
        (sampling(fill_context=True, most_by_default=5), None, 5),
        (sampling(max_tokens=6, most_by_default=5), None, 6),
        (CHAT_DOOR, TokensLeft(10_000, 10_000), 950),
        (CHAT_DOOR, TokensLeft(500, 500), 450),  # a minute holds less than the context
        (CHAT_DOOR, TokensLeft(200, 500), 150),  # others of the key run
        (CHAT_DOOR, TokensLeft(60, 500), 16),  # no shorter than usual: it waits
        (CHAT_DOOR, TokensLeft(60, 60), 10),  # waiting would not help
        (CHAT_DOOR, TokensLeft(40, 40), 1),  # nor would this: the prompt alone is too much
        (sampling(fill_context=True, min_tokens=30), TokensLeft(60, 500), 30),
        (replace(CHAT_DOOR, answers=4), TokensLeft(450, 500), 100),  # four answers share what is there
        (sampling(fill_context=True, beams=Beams(4, 1)), TokensLeft(450, 500), 100),  # so do beams
        (replace(CHAT_DOOR, answers=4, first=FIRST), TokensLeft(300, 500), 16),  # and are as long as the first
        (sampling(max_tokens=600), TokensLeft(100, 500), 600),  # what a client asks for is not changed
    ],
)
def test_our_own_default_is_cut_to_what_fits(raw: RawRequest, left: TokensLeft | None, expected: int) -> None:
    assert default_of(raw, 50, left) == expected


def test_a_further_answer_is_of_the_first_ones_kind_and_counts_no_prompt() -> None:
    chat = admit(replace(TEXT, text=None, chat=Chat([ChatMessage("user", "hi")])), [1, 2], CONFIG, MODEL, 5.0, None,
                 "r", random.Random(0))  # fmt: skip
    further = admitted(replace(TEXT, text=None, token_ids=chat.prompt, first=chat), [1, 2])
    assert (chat.operation, chat.counted(3)) == ("chat", 5)
    assert (further.operation, further.again, further.counted(3)) == ("chat", True, 3)


def resolved(raw: RawRequest, **models: float) -> dict[str, float]:
    """What a worker is told, where it is not the plain default."""
    model = replace(MODEL, sampling=SamplingDefaults(**models))  # type: ignore[arg-type]
    sampled = admit(raw, [1, 2], CONFIG, model, 0.0, None, "r", random.Random(0)).sampling
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    return {name: getattr(sampled, name) for name in names}


def test_what_a_request_leaves_out_is_the_model_authors() -> None:
    models = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    assert resolved(TEXT, **models) == models | {"max_tokens": 62}
    ours = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert resolved(TEXT) == ours | {"max_tokens": 62}
    assert resolved(sampling(**ours), **models) == ours | {"max_tokens": 62}  # asked for, so not left out


def test_an_apis_own_temperature_comes_after_the_models() -> None:
    openai = sampling(unset_temperature=1.0)
    assert resolved(openai)["temperature"] == 1.0
    assert resolved(openai, temperature=0.6)["temperature"] == 0.6
    assert resolved(sampling(unset_temperature=1.0, temperature=0.0), temperature=0.6)["temperature"] == 0.0


@pytest.mark.parametrize(("asked", "granted"), [(None, 10), (5, 5), (50, 10)])
def test_the_models_max_new_tokens_is_a_limit_for_all(asked: int | None, granted: int) -> None:
    assert resolved(sampling(max_tokens=asked), max_tokens=10)["max_tokens"] == granted


def test_ids_that_no_array_holds_are_cut_as_ids() -> None:
    """A list of none joined to one of ids would be an array of floats."""
    kept = admitted(replace(TEXT, truncate_prompt_tokens=2), [-1, 5, 6]).prompt
    assert [type(token) for token in kept] == [int, int]
    assert list(kept) == [5, 6]
