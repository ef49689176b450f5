"""Structured output and logit bias: exact against plain transformers, valid whatever the model says, refused or ended
with the cause where they cannot be.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar import GrammarCompiler, Masks, Matcher
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.scheduler import EngineLimits
from engine.types import (
    FinishReason,
    RefusalCode,
    SamplingParams,
    SequenceEnded,
    SequenceSpec,
    StepPlan,
    StepResult,
)
from grammar.structured import Kind, Structured, StructuredError, check
from router.text.tools.demand import demand_calls
from router.text.tools.events import collect
from router.text.tools.families import FAMILIES

END = frozenset([2])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip
FORMATS = {
    "schema": Structured(Kind.JSON_SCHEMA, json.dumps(PERSON)),
    "object": Structured(Kind.JSON_OBJECT),
    "regex": Structured(Kind.REGEX, r"\d{3}-[a-f]{2,8}"),
    "lark": Structured(Kind.LARK, 'start: "I think " opinion "."\nopinion: /[a-z ]{5,30}/'),
    "choice": Structured(Kind.CHOICE, options=("positive", "negative", "pos", "it depends")),
}


@pytest.fixture(scope="module")
def compiler(model_path: Path) -> GrammarCompiler:
    return GrammarCompiler(str(model_path), 49152)


@pytest.fixture(scope="module")
def runner(model_path: Path) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(model_path), dtype="float32", num_blocks=100, threads=1))


class NoModel:
    """A runner with the real sampler and no model: logits are noise, with a liking for what ends strings and lists."""

    def __init__(self, closing: list[int], seed: int = 0) -> None:
        self._sampler = Sampler(49152)
        self._generator = torch.Generator().manual_seed(seed)
        self._liking = torch.zeros(49152)
        self._liking[closing] = 7.0

    def execute(self, plan: StepPlan) -> StepResult:
        items = [item for item in plan.items if item.sample]
        logits = torch.randn((len(items), 49152), generator=self._generator) * 2 + self._liking
        tokens, logprobs = self._sampler.sample(logits, items)
        found = iter(zip(tokens, logprobs, strict=True))
        pairs = [next(found) if item.sample else (None, None) for item in plan.items]
        return StepResult(tuple(t for t, _ in pairs), tuple(p for _, p in pairs))


class Engine:
    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.core = EngineCore(EngineLimits(32, 512, 64, 128, 8192, 49152), BlockPool(100, np.zeros(100, np.uint64)))
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, SequenceEnded] = {}
        self.logprobs: dict[int, list[Any]] = {}

    def add(self, number: int, prompt: list[int], matcher: Matcher | None, emitted: tuple[int, ...] = (), **s: Any):
        sampling = SamplingParams(**{"stop_token_ids": END, "max_tokens": 60, **s})
        self.answers[number], self.logprobs[number] = list(emitted), []
        refusal = self.core.add(SequenceSpec(number, prompt, sampling, emitted, matcher=matcher), 0.0)
        if refusal is None:
            self._note(self.core.end_if_complete(number))
        return refusal

    def run(self) -> Engine:
        while (plan := self.core.schedule(0.0)) is not None:
            self._note(self.core.commit(plan, self._runner.execute(plan), 0.0))
            self.core.check()
        assert self.core.is_idle()
        return self

    def _note(self, events: Any) -> None:
        for token in events.tokens:
            assert token.position == len(self.answers[token.sequence_id])
            self.answers[token.sequence_id].append(token.token_id)
            self.logprobs[token.sequence_id].append(token.logprobs)
        for end in events.ends:
            self.ends[end.sequence_id] = end


def reference(model: Any, prompt: list[int], matcher: Matcher | None, bias: dict[int, float], steps: int) -> list[int]:
    """Plain transformers, masked by llguidance's own NumPy interface, a sequence on its own."""
    import llguidance.numpy
    from transformers import LogitsProcessor, LogitsProcessorList

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if matcher is not None and input_ids.shape[1] > len(prompt):
                assert matcher.inner.consume_token(int(input_ids[0, -1]))
            for token, value in bias.items():
                scores[0, token] += value
            if matcher is None:
                return scores
            mask = llguidance.numpy.allocate_token_bitmask(1, scores.shape[-1])
            llguidance.numpy.fill_next_token_bitmask(matcher.inner, mask)
            masked = scores.numpy().copy()
            llguidance.numpy.apply_token_bitmask_inplace(masked, mask)
            return torch.from_numpy(masked)

    ids = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=steps, pad_token_id=2, eos_token_id=2,
        logits_processor=LogitsProcessorList([Processor()]),
    )[0].tolist()  # fmt: skip
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def plain_model(model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()


def prompt_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]


def test_greedy_under_a_grammar_is_what_plain_transformers_gives(
    runner: ModelRunner, plain_model: Any, compiler: GrammarCompiler, tokenizer: Any
) -> None:
    """All formats, a bias, and a free answer in one batch; each sequence as if it were alone."""
    engine = Engine(runner)
    prompts = {name: prompt_of(tokenizer, f"Tell me about {name}.") for name in [*FORMATS, "free", "biased"]}
    bias = {1200: 6.0, 198: -100.0, 28: 4.5}
    matchers = {name: compiler.compile(structured) for name, structured in FORMATS.items()}
    for number, (name, prompt) in enumerate(prompts.items()):
        matcher = matchers[name].start() if name in matchers else None
        biased = name in ("biased", "lark")
        engine.add(number, prompt, matcher, max_tokens=24, logit_bias=tuple(sorted(bias.items())) if biased else ())
    engine.run()
    for number, (name, prompt) in enumerate(prompts.items()):
        matcher = matchers[name].start() if name in matchers else None
        expected = reference(plain_model, prompt, matcher, bias if name in ("biased", "lark") else {}, 24)
        if matcher is not None and engine.ends[number].reason is FinishReason.STOP and expected[-1] == 2:
            expected = expected[:-1] if engine.answers[number][-1] != 2 else expected
        assert engine.answers[number] == expected, name


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_goes_on_elsewhere_at_any_point(
    compiler: GrammarCompiler, tokenizer: Any, name: str, temperature: float
) -> None:
    """What a resume on another worker does: prompt and emitted tokens, a matcher from the beginning."""

    class Keyed(NoModel):
        """Logits by position, the same on every worker."""

        def execute(self, plan: StepPlan) -> StepResult:
            (item,) = plan.items
            self._generator.manual_seed(item.position)
            return super().execute(plan)

    closing = closing_tokens(tokenizer)
    grammar = compiler.compile(FORMATS[name])
    whole = Engine(Keyed(closing))
    whole.add(0, [1, 2, 3], grammar.start(), temperature=temperature, seed=5)
    answer = whole.run().answers[0]
    for cut in range(1, len(answer) + 1):
        if cut == len(answer) and whole.ends[0].reason is FinishReason.LENGTH:
            break
        resumed = Engine(Keyed(closing))
        if answer[cut - 1] == 2 and cut == len(answer):
            break  # the router knows that this is the end
        assert resumed.add(0, [1, 2, 3], grammar.start(), tuple(answer[:cut]), temperature=temperature, seed=5) is None
        resumed.run()
        assert resumed.answers[0] == answer, cut
        assert resumed.ends[0].reason is whole.ends[0].reason


def closing_tokens(tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(t) for t in ('"', "}", "]", '"}', '",', ",", '":', "1", "true")]


# The vocabulary has no token for some bytes, and no way to write characters that begin with them.
WRITABLE = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])


# Schemas of bounded answers, so that most of them end by themselves.
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
              st.integers(-1000, 1000), st.integers(0, 5000)),
    st.builds(lambda n, more: {"type": "string", "minLength": n, "maxLength": n + more},
              st.integers(0, 3), st.integers(0, 6)),
    st.sampled_from([{"type": "number"}, {"type": "string", "format": "date"},
                     {"type": "string", "pattern": "^[a-c]{2,4}$"}]),
    st.lists(st.integers() | st.text(WRITABLE, max_size=6) | st.booleans() | st.none(), min_size=1, max_size=4).map(
        lambda values: {"enum": values}),
    st.text(WRITABLE, max_size=8).map(lambda value: {"const": value}),
)  # fmt: skip
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.dictionaries(st.text(WRITABLE, min_size=1, max_size=5), inner, min_size=1, max_size=3).flatmap(
            lambda properties: st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {"type": "object", "properties": properties, "required": required,
                                  "additionalProperties": False})),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)  # fmt: skip


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(schemas, min_size=8, max_size=24), st.integers(0, 2**32))
def test_answers_are_valid_in_any_batch(compiler: GrammarCompiler, tokenizer: Any, many: list[Any], seed: int) -> None:
    engine = Engine(NoModel(closing_tokens(tokenizer), seed))
    structured = {i: Structured(Kind.JSON_SCHEMA, json.dumps(schema)) for i, schema in enumerate(many)}
    usable: dict[int, Any] = {}
    for i, one in structured.items():
        try:
            check(one)
        except StructuredError:
            continue  # some combinations no grammar can have; the router says so
        usable[i] = compiler.compile(one)
    for i, grammar in usable.items():
        assert engine.add(i, [1, 2, 3 + i], grammar.start(), temperature=1.0, seed=seed + i, max_tokens=300) is None
    assert engine.add(-1, [5], None, temperature=1.0, max_tokens=5) is None
    engine.run()
    for i in usable:
        assert not engine.ends[i].error
        if engine.ends[i].reason is FinishReason.STOP:
            text = tokenizer.decode(engine.answers[i], skip_special_tokens=True)
            jsonschema.validate(json.loads(text), many[i])
    assert len(engine.answers[-1]) <= 5


@pytest.mark.parametrize("name", ["regex", "choice", "lark"])
def test_other_formats_hold_too(compiler: GrammarCompiler, tokenizer: Any, name: str) -> None:
    import re

    grammar = compiler.compile(FORMATS[name])
    engine = Engine(NoModel([], seed=3))
    for i in range(32):
        engine.add(i, [1, 2, 3], grammar.start(), temperature=1.0, seed=i)
    engine.run()
    texts = {tokenizer.decode(answer, skip_special_tokens=True) for answer in engine.answers.values()}
    whole = {
        "regex": r"\d{3}-[a-f]{2,8}", "choice": "positive|negative|pos|it depends", "lark": r"I think [a-z ]{5,30}\."
    }[name]  # fmt: skip
    assert all(re.fullmatch(whole, text) for text in texts), texts
    assert len(texts) > 1
    assert {end.reason for end in engine.ends.values()} == {FinishReason.STOP}


def test_minimum_length_and_ignored_ends_wait_only_while_something_else_may_come(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    several = compiler.compile(Structured(Kind.REGEX, "[a-z]{1,40}"))
    one = compiler.compile(Structured(Kind.CHOICE, options=("yes",)))
    engine = Engine(NoModel([2, 84]))
    engine.add(0, [1], several.start(), min_tokens=6, max_tokens=50, temperature=1.0)
    engine.add(1, [1], one.start(), min_tokens=6, max_tokens=50)
    engine.add(2, [1], several.start(), stop_token_ids=frozenset(), max_tokens=50, temperature=1.0)  # ignore_eos
    engine.add(3, [1], several.start(), max_tokens=2, temperature=1.0, seed=4, min_tokens=2)
    engine.run()
    texts = [tokenizer.decode(engine.answers[i], skip_special_tokens=True) for i in range(4)]
    assert len(engine.answers[0]) >= 6
    assert texts[1] == "yes"
    assert len(texts[2]) == 40, "it went on for as long as the grammar let it"
    assert [engine.ends[i].reason for i in range(4)] == [FinishReason.STOP] * 3 + [FinishReason.LENGTH]


def test_a_stop_token_cuts_the_answer_and_logprobs_are_of_the_raw_distribution(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    dash = tokenizer.convert_tokens_to_ids("-")
    engine = Engine(NoModel([]))
    grammar = compiler.compile(FORMATS["regex"])
    engine.add(0, [1], grammar.start(), stop_token_ids=END | {dash}, logprobs=3, temperature=1.0)
    engine.run()
    assert engine.answers[0][-1] == dash
    assert engine.ends[0].reason is FinishReason.STOP
    for value in engine.logprobs[0]:
        assert len(value.top) == 3
        assert value.logprob < value.top[0][1], "noise all over the vocabulary prefers what the grammar forbids"


def test_penalties_and_bias_choose_among_what_is_allowed(compiler: GrammarCompiler, tokenizer: Any) -> None:
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    grammar = compiler.compile(Structured(Kind.CHOICE, options=("yes", "no")))
    engine = Engine(NoModel([]))
    engine.add(0, [1], grammar.start(), logit_bias=((yes, 100.0), (5000, 100.0)))
    engine.add(1, [1], grammar.start(), logit_bias=((no, 100.0), (5000, 100.0)))
    engine.add(2, [1, yes], grammar.start(), logit_bias=((yes, 50.0), (no, 45.0)), repetition_penalty=1.5)
    engine.run()
    assert [tokenizer.decode(engine.answers[i]) for i in range(3)] == ["yes", "no", "no"]


def test_a_grammar_without_a_way_out_is_an_explicit_end(compiler: GrammarCompiler) -> None:
    """The first wants a character that no token can write, the second what no text is. Neighbours go on."""
    engine = Engine(NoModel([]))
    engine.add(0, [1], compiler.compile(Structured(Kind.CHOICE, options=("ab\U00040000",))).start())
    engine.add(1, [1], None, max_tokens=8)
    try:
        engine.add(2, [1], compiler.compile(Structured(Kind.LARK, "start: T\nT: /a+/ & /b+/")).start())
    except StructuredError:
        pass  # refused before any work
    engine.run()
    assert engine.ends[0].reason is None
    assert "cannot go on" in engine.ends[0].error
    assert len(engine.answers[1]) == 8
    assert 2 not in engine.ends or "cannot go on" in engine.ends[2].error


def test_emitted_tokens_that_break_the_grammar_are_refused(compiler: GrammarCompiler) -> None:
    refusal = Engine(NoModel([])).add(0, [1], compiler.compile(FORMATS["regex"]).start(), (5000,))
    assert refusal is not None
    assert refusal.code is RefusalCode.INVALID
    assert "does not follow the grammar" in refusal.reason


def test_the_compiler_names_the_cause(compiler: GrammarCompiler) -> None:
    with pytest.raises(StructuredError, match="unknown special token"):
        compiler.compile(Structured(Kind.LARK, "start: <|nothing|>"))
    with pytest.raises(StructuredError, match="no tokenizer for /nowhere"):
        GrammarCompiler("/nowhere", 100).compile(FORMATS["regex"])


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                    "city": {"type": "string", "maxLength": 8},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city"],
                "additionalProperties": False,
                "$defs": {"unit": {"enum": ["C", "F", True, None]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_demanded_tool_calls_are_read_back(compiler: GrammarCompiler, tokenizer: Any, family: str) -> None:
    """Whatever the model would rather say: calls of the tools, arguments valid, and no text around them."""
    any_tool = compiler.compile(demand_calls(family, TOOLS))
    one_tool = compiler.compile(demand_calls(family, TOOLS, name="get_weather", parallel=False))
    engine = Engine(NoModel(closing_tokens(tokenizer), seed=11))
    for i in range(12):
        grammar = any_tool if i % 2 else one_tool
        engine.add(i, [1, 2], grammar.start(), temperature=1.0, seed=i, max_tokens=400)
    engine.run()
    finished = [i for i, end in engine.ends.items() if end.reason is FinishReason.STOP]
    assert len(finished) >= 6
    names = set()
    for i in finished:
        parser = FAMILIES[family].parser(frozenset(["get_weather", "now"]))
        answer = tokenizer.decode(engine.answers[i], skip_special_tokens=True)
        text, calls = collect([*parser.push(answer), *parser.finish()])
        assert text == "", answer
        assert calls
        for call in calls:
            names.add(call.name)
            parameters = TOOLS[0]["function"]["parameters"] if call.name == "get_weather" else {"maxProperties": 0}
            jsonschema.validate(json.loads(call.arguments), parameters)
        if not i % 2:
            assert [c.name for c in calls] == ["get_weather"]
    assert "get_weather" in names


@pytest.mark.parametrize(
    "structured",
    [
        Structured(Kind.JSON_SCHEMA, '{"type": "number"}'),
        Structured(
            Kind.JSON_SCHEMA,
            '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],'
            ' "additionalProperties": false}',
        ),
        Structured(Kind.JSON_SCHEMA, '{"type": "array", "items": {"type": ["number", "string"]}, "minItems": 1}'),
        Structured(Kind.LARK, 'start: "x" %json {"type": "number"} "y"'),
    ],
)
def test_a_number_ends_whatever_the_model_likes(compiler: GrammarCompiler, structured: Structured) -> None:
    """A model that writes a digit wherever it may: the answer is whole, and soon."""
    masks, matcher = Masks(49152), compiler.compile(structured).start()
    tokenizer = matcher._tokenizer
    digits = [t for t in range(49152) if tokenizer.decode_bytes([t]) in (b"3", b"33", b"0.")]
    text = b""
    for _ in range(200):
        (mask,) = masks.fill([matcher])
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")
        taken = next((t for t in digits if allowed[t]), int(np.flatnonzero(allowed)[-1]))
        if taken in matcher.end_tokens:
            break
        text += tokenizer.decode_bytes([taken])
        assert matcher.advance([taken])
        if matcher.complete or len(text) > 400:
            break
    numbers = re.findall(rb"[-0-9.eE+]{2,}", text)
    assert numbers
    assert max(map(len, numbers)) <= 42, text


def test_digits_that_a_schema_asks_for_are_all_written(compiler: GrammarCompiler) -> None:
    wanted = "9" * 60
    matcher = compiler.compile(Structured(Kind.LARK, f'start: %json {{"type": "string"}} "{wanted}"')).start()
    masks = Masks(49152)
    for token in matcher._tokenizer.tokenize_str(f'"a"{wanted}'):
        (mask,) = masks.fill([matcher])
        assert mask[token // 32] >> np.uint32(token % 32) & 1
        assert matcher.advance([token])
