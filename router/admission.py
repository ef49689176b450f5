"""Bad input becomes a clear error before any work: what is wrong, what would be right, which field."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from checkpoint.generation import SamplingDefaults
from grammar.structured import MAX_CHOICES, Structured, StructuredError, check_size
from router.access.rate_limit import TokensLeft
from router.beams import check_beams
from router.config import RouterConfig
from router.errors import CONTEXT_LENGTH, Code, RequestRefused, refuse
from router.placement.cluster import WorkerInfo
from router.placement.policy import Placement
from router.request import Beams, Request, Sampling
from router.text.bad_words import MAX_BAD_WORDS_BYTES, bad_word_tokens
from router.text.chat import MAX_CHAT_MESSAGES, Chat, ChatError, check_chat
from router.text.structured import structured_refused
from router.text.tokenizer import Tokenizer
from settings.sampling import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PROMPT_LOGPROBS,
    RANGES,
    resolved,
)

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_ID_BYTES = 256
_SHOWN_CHARS = 100  # of what the client sent, in an error
_WORD_CHARS = 64  # to tokenize a word takes as long, however short it is
_TEXT_SLACK = 2  # a tokenizer may drop or join some of the text before it cuts it into tokens
_COME_AGAIN_MS = 500  # a router that has just started may not know all adapters yet
_CUT_SLACK_TOKENS = 64  # where a text is cut its first tokens are others


@dataclass(frozen=True, slots=True)
class RawSampling:
    """As the client sent it; None where it left a default."""

    temperature: float | None = None
    unset_temperature: float = 0.0  # of this API, where neither the client nor the model says
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    fill_context: bool = False  # without max_tokens: what the context has room for, not the router's default
    default_max_tokens: int | None = None  # without max_tokens: what this door's clients expect instead of the router's
    most_by_default: int | None = None  # without max_tokens: never more, whatever has room
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    structured: Structured | None = None
    beams: Beams | None = None


@dataclass(frozen=True, slots=True)
class RawRequest:
    """Exactly one of text, token_ids and chat is set, or none (which is refused)."""

    request_id: str = ""
    model: str = ""
    text: str | None = None
    token_ids: Sequence[int] | None = None
    chat: Chat | None = None
    sampling: RawSampling = field(default_factory=RawSampling)
    priority: int = 0
    deadline_ms: int = 0
    cache_salt: str = ""
    placement: Placement = Placement.AUTO
    tools: bool = False  # token_ids are those of a chat that offers tools
    prompt_cache_key: str = ""
    emitted_token_ids: Sequence[int] = ()
    revision: str = ""  # that the emitted tokens come from
    first: Request | None = None  # of several answers to one prompt: whose prompt this is, too
    answers: int = 1  # to this prompt, of which this is one
    which: int = 0
    bad_words: tuple[tuple[int, ...], ...] | None = None  # the sampling's, in tokens; None: not yet tokenized
    truncate_prompt_tokens: int | None = None  # the last so many of the prompt's are kept; -1: those that fit
    front_tokens: int = 0  # those that the tokenizer puts before every text; kept, too, and counted

    @property
    def offers_tools(self) -> bool:
        return self.tools or (self.chat is not None and bool(self.chat.tools_json))

    @property
    def size_chars(self) -> int:
        """Of text that will be tokenized."""
        return len(self.text or "") + (self.chat.size_chars if self.chat is not None else 0)

    @property
    def size_words(self) -> int:
        """Of bad words that will be tokenized, as the text that takes as long: each costs something by itself."""
        if self.first is not None or self.bad_words is not None:
            return 0
        return sum(_WORD_CHARS + 2 * len(word) for word in self.sampling.bad_words)


class AnswerLength:
    """What answers have been long lately: `max_tokens` is a bound, and rarely what an answer takes."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def observe(self, tokens: int) -> None:
        self._mean = tokens if self._mean is None else self._mean + 0.05 * (tokens - self._mean)

    def expected(self, max_tokens: int) -> int:
        """0 before anything is known: then nobody is refused for it."""
        return 0 if self._mean is None else min(max_tokens, int(self._mean))


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    vocab_size: int
    context_limit_tokens: int
    eos_token_ids: frozenset[int]
    longest_text_chars: int = 1 << 60  # more cannot fit into the context, whatever it says
    limit_is: str = "the context limit"  # what sets `context_limit_tokens`
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    aliases: tuple[str, ...] = ()
    masks_tokens: bool = True  # all of its workers know allowed_token_ids and bad_words
    adapters: Mapping[str, str] = field(default_factory=dict)  # digests by name: served as models, too
    older: Mapping[str, Collection[str]] = field(default_factory=dict)  # by name, digests that answers may go on with
    scores_prompts: bool = True  # likewise prompt_logprobs
    searches_beams: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """All that requests may use."""
        return (*self.own_names, *self.adapters)

    @property
    def own_names(self) -> tuple[str, ...]:
        """Of the model alone."""
        return self.aliases or (self.name,)

    def called(self, asked: str) -> tuple[str, ...]:
        """All names of what is asked for."""
        return (asked,) if asked in self.adapters else self.own_names


def narrowed(
    tokenizer: Tokenizer, decode: Sequence[WorkerInfo], prefill: Sequence[WorkerInfo], name: str, **given: Any
) -> ServedModel:
    """The tokenizer's view, narrowed by what the workers can do. `given`: further fields."""
    infos = (*decode, *prefill)
    limit = min([i.context_limit_tokens for i in infos] + [tokenizer.context_limit_tokens or 1 << 30])
    pool = max((i.pool_tokens for i in decode), default=limit)
    return ServedModel(
        name,
        min([i.vocab_size for i in infos] or [tokenizer.vocab_size or 1 << 30]),
        min(limit, pool),
        tokenizer.eos_token_ids,
        _TEXT_SLACK * min(limit, pool) * tokenizer.longest_token_chars,
        "the context limit" if pool >= limit else "the limit of the largest decode worker's KV pool",
        masks_tokens=all(i.masks_tokens for i in infos),
        scores_prompts=all(i.scores_prompts for i in infos),
        searches_beams=not decode or any(i.searches_beams for i in decode),
        **given,
    )


def usable_id(request_id: str) -> bool:
    """It stands in logs, traces and headers."""
    return 0 < len(request_id) <= MAX_ID_BYTES and request_id.isascii() and request_id.isprintable()


def another(raw: RawRequest, which: int, first: Request) -> RawRequest:
    """A further answer to a prompt that is tokenized already."""
    seed = raw.sampling.seed
    sampling = replace(raw.sampling, seed=None if seed is None else (seed + which) % (1 << 64))
    further = replace(raw, text=None, chat=None, token_ids=first.prompt, tools=raw.offers_tools, sampling=sampling)
    return replace(further, first=first, which=which)


def check_counts(
    *,
    chat_messages: int = 0,
    stop: int = 0,
    stop_token_ids: int = 0,
    logit_bias: int = 0,
    allowed_token_ids: int = 0,
    bad_words: int = 0,
    choices: int = 0,
) -> None:
    """Of a message as it came, before any of it is copied: an empty element costs the sender two bytes and us fifty
    times that. Raises RequestRefused.
    """
    for name, what, count, limit in (
        ("chat", "chat messages", chat_messages, MAX_CHAT_MESSAGES),
        ("stop", "stop strings", stop, MAX_STOP_STRINGS),
        ("stop_token_ids", "stop token ids", stop_token_ids, MAX_STOP_TOKEN_IDS),
        ("logit_bias", "biased tokens", logit_bias, MAX_LOGIT_BIASES),
        ("allowed_token_ids", "allowed tokens", allowed_token_ids, MAX_ALLOWED_TOKEN_IDS),
        ("bad_words", "bad words", bad_words, MAX_BAD_WORDS),
        ("structured", "options", choices, MAX_CHOICES),
    ):
        if count > limit:
            raise _invalid(name, f"{count} {what}, the limit is {limit}; send fewer")


def check_before_tokenizing(raw: RawRequest, config: RouterConfig, model: ServedModel) -> None:
    """Everything that needs no tokens. Raises RequestRefused."""
    check_counts(
        chat_messages=len(raw.chat.messages) if raw.chat is not None else 0,
        stop=len(raw.sampling.stop),
        stop_token_ids=len(raw.sampling.stop_token_ids),
        logit_bias=len(raw.sampling.logit_bias),
        allowed_token_ids=len(raw.sampling.allowed_token_ids),
        bad_words=len(raw.sampling.bad_words),
    )
    if raw.request_id and not usable_id(raw.request_id):
        raise _invalid("request_id", f"request_id is not printable ASCII of 1 to {MAX_ID_BYTES} bytes; use another")
    _check_model(raw, model)
    kept = raw.truncate_prompt_tokens
    if kept is not None and kept != -1 and kept < 1:
        why = f"truncate_prompt_tokens is {kept}; use how many tokens to keep, or -1 for as many as fit"
        raise _invalid("truncate_prompt_tokens", why)
    _check_prompt(raw, config, model)
    _check_sampling(raw.sampling)
    check_beams(raw, len(model.eos_token_ids), known=model.searches_beams)
    if not -100 <= raw.priority <= 100:
        raise _invalid("priority", f"priority is {raw.priority}; use -100..100")
    if len(raw.cache_salt.encode()) > MAX_ID_BYTES:
        raise _invalid("cache_salt", f"cache_salt is longer than {MAX_ID_BYTES} bytes; use a shorter one")
    if len(raw.prompt_cache_key.encode()) > MAX_ID_BYTES:
        raise _invalid("prompt_cache_key", f"prompt_cache_key is longer than {MAX_ID_BYTES} bytes; use a shorter one")
    if len(raw.emitted_token_ids) >= model.context_limit_tokens:
        raise _invalid(
            "emitted_token_ids",
            f"{len(raw.emitted_token_ids)} emitted tokens, the context limit is {model.context_limit_tokens}; "
            "send those of one answer",
        )


def _check_model(raw: RawRequest, model: ServedModel) -> None:
    if not raw.model or raw.model == model.name or raw.model in model.names:
        return
    asked = raw.model if len(raw.model) <= _SHOWN_CHARS else f"{raw.model[:_SHOWN_CHARS]}..."
    served = " or ".join(map(repr, model.names))
    why = f"model {asked!r} is not served here; served is {served}"
    raise refuse(Code.NOT_FOUND, why, field="model", reason="model_not_found")


def _check_prompt(raw: RawRequest, config: RouterConfig, model: ServedModel) -> None:
    if raw.text is None and raw.token_ids is None and raw.chat is None:
        raise _invalid("prompt", "the request has no prompt; set text, token_ids or chat")
    if raw.text is not None and not raw.text:
        raise _invalid("text", "the prompt is empty; send at least one character")
    if raw.token_ids is not None and not len(raw.token_ids):
        raise _invalid("token_ids", "the prompt is empty; send at least one token id")
    if raw.chat is not None:
        try:
            check_chat(raw.chat)
        except ChatError as error:
            raise _invalid(error.field, str(error)) from None
    size = 0
    if raw.text is not None:
        size = len(raw.text.encode())
    elif raw.chat is not None:
        size = raw.chat.size_bytes
    elif raw.token_ids is not None:
        size = 4 * len(raw.token_ids)
    chars = raw.size_chars
    cut = raw.truncate_prompt_tokens is not None and raw.chat is None
    if chars > model.longest_text_chars and not cut:
        raise _invalid(
            "prompt",
            f"the prompt has {chars} characters; the context of {model.context_limit_tokens} tokens holds "
            f"{model.longest_text_chars} at the very most; shorten it",
            CONTEXT_LENGTH,
        )
    if size > config.max_prompt_bytes:
        raise _invalid(
            "prompt", f"the prompt has {size} bytes, the limit is {config.max_prompt_bytes}; send a shorter one"
        )


def _check_sampling(s: RawSampling) -> None:
    for name, allowed in RANGES.items():
        value = getattr(s, name)
        if value is not None and value not in allowed:
            raise _invalid(name, f"{name} is {value}; use {allowed}")
    if s.max_tokens is not None and s.max_tokens < (1 if s.prompt_logprobs is None else 0):
        why = "ask for at least one token, or leave it out; with prompt_logprobs, or echo, it may be 0"
        raise _invalid("max_tokens", f"max_tokens is {s.max_tokens}; {why}")
    for name in ("logprobs", "prompt_logprobs"):
        if (asked := getattr(s, name)) is not None and asked > MAX_LOGPROBS:
            raise _invalid(name, f"{name} is {asked}; use at most {MAX_LOGPROBS}")
    if any(len(x.encode()) > MAX_STOP_BYTES for x in s.stop):
        raise _invalid("stop", f"a stop string is longer than {MAX_STOP_BYTES} bytes; send a shorter one")
    for token_id, bias in s.logit_bias.items():
        if not abs(bias) <= MAX_LOGIT_BIAS:  # also what is not a number
            allowed = f"[-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
            raise _invalid("logit_bias", f"the bias of token {token_id} is {bias}; use {allowed}")
    if any(not word.strip() for word in s.bad_words):
        raise _invalid("bad_words", "a bad word has no text; leave it out")
    if sum(len(word.encode(errors="replace")) for word in s.bad_words) > MAX_BAD_WORDS_BYTES:
        raise _invalid("bad_words", f"the bad words have more than {MAX_BAD_WORDS_BYTES} bytes; send fewer")
    for name in ("allowed_token_ids", "bad_words"):
        if s.structured is not None and getattr(s, name):
            why = "the format of the answer (structured output, or tools that must be called) allows tokens itself"
            raise _invalid(name, f"{name} cannot be used here: {why}; leave one of them out")
    if s.structured is not None:
        try:
            check_size(s.structured)
        except StructuredError as error:
            raise structured_refused(s.structured, error) from None


def tokenize(raw: RawRequest, tokenizer: Tokenizer, add_special_tokens: bool | None = None) -> Sequence[int]:
    """May take tens of milliseconds for a long prompt: runs beside the event loop.

    `add_special_tokens` None: as a prompt has it; a template writes its own.
    """
    if raw.text is not None:
        return tokenizer.encode(raw.text, add_special_tokens=add_special_tokens is not False)
    if raw.chat is not None:
        return tokenizer.encode_chat(raw.chat, add_special_tokens=bool(add_special_tokens))
    assert raw.token_ids is not None
    return list(raw.token_ids)


def tokenized(raw: RawRequest, tokenizer: Tokenizer, model: ServedModel) -> tuple[RawRequest, Sequence[int]]:
    """With its bad words in tokens, and its prompt as an array: what is done to a long one from here on is done to the
    whole of it at once.
    """
    if raw.first is not None:  # the very same array: a copy for each answer would be large, and waited for
        return replace(raw, bad_words=raw.first.sampling.bad_words), raw.first.prompt
    if raw.bad_words is None:
        raw = replace(raw, bad_words=bad_word_tokens(raw.sampling.bad_words, tokenizer, model.vocab_size))
    kept = raw.truncate_prompt_tokens
    if raw.text is not None and kept is not None:
        limit, longest = model.context_limit_tokens, model.longest_text_chars  # twice what can be kept
        if 0 < kept < limit - _CUT_SLACK_TOKENS:
            longest = max(1, longest * (kept + _CUT_SLACK_TOKENS) // limit)
        raw = replace(raw, text=raw.text[-longest:], front_tokens=tokenizer.front_tokens)
    prompt = tokenize(raw, tokenizer)
    try:
        return raw, cast("Sequence[int]", np.asarray(prompt, dtype=np.uint32))
    except (OverflowError, ValueError):
        return raw, prompt  # no token ids at all: admission says so


# What transformers takes beside a template's variables, and a request has fields for.
_ANOTHER_ANSWER = frozenset({"add_generation_prompt", "continue_final_message"})


def admit(
    raw: RawRequest,
    prompt: Sequence[int],
    config: RouterConfig,
    model: ServedModel,
    now: float,
    grpc_deadline_s: float | None,
    request_id: str,
    rng: random.Random,
    traceparent: str = "",
    left: TokensLeft | None = None,
) -> Request:
    """Defaults resolved, limits checked. `left`: what the key may use; None: no limit. Raises RequestRefused."""
    if raw.chat is not None and (asked := _ANOTHER_ANSWER & raw.chat.template_kwargs().keys()):
        raise _invalid("chat_template_kwargs_json", f"{min(asked)} is a field of the request; set it there")
    prompt = _kept(raw, prompt, config, model)
    if not len(prompt):
        raise _invalid("prompt", "the prompt has no tokens; send text that the tokenizer does not drop")
    highest = int(np.max(prompt))
    if highest >= model.vocab_size:
        raise _unknown_token(raw, highest, model)
    limit = model.context_limit_tokens
    room = limit - len(prompt)
    if room < (raw.sampling.max_tokens != 0):
        raise _invalid(
            "prompt",
            f"the prompt has {len(prompt)} tokens and {model.limit_is} is {limit}, answer included; shorten it",
            CONTEXT_LENGTH,
        )
    s, defaults = raw.sampling, model.sampling
    if s.max_tokens is not None and s.max_tokens > room:
        raise _invalid(
            "max_tokens",
            f"prompt ({len(prompt)} tokens) and max_tokens ({s.max_tokens}) exceed {model.limit_is} of {limit}; "
            f"ask for at most {room}",
            CONTEXT_LENGTH,
        )
    emitted = tuple(raw.emitted_token_ids)
    begun_on, adapter = _begun_on(raw, model)
    max_tokens = s.max_tokens
    if max_tokens is None:
        max_tokens = _our_max_tokens(raw, len(prompt), room, config, left)
    max_tokens = min(max_tokens, defaults.max_tokens or max_tokens)
    if len(emitted) > max_tokens:
        raise _invalid(
            "emitted_token_ids",
            f"{len(emitted)} emitted tokens are more than max_tokens ({max_tokens}); send max_tokens as the first time",
        )
    if emitted and max(emitted) >= model.vocab_size:
        raise _invalid(
            "emitted_token_ids",
            f"token id {max(emitted)} is not in the model's vocabulary of {model.vocab_size}; send the answer's own",
        )
    if (s.min_tokens or 0) > max_tokens:
        raise _invalid("min_tokens", f"min_tokens ({s.min_tokens}) exceeds max_tokens ({max_tokens}); lower it")
    allowed = tuple(sorted(set(s.allowed_token_ids))) if raw.first is None else raw.first.sampling.allowed_token_ids
    ends = (*allowed[:1], *allowed[-1:])
    for name, ids in (("stop_token_ids", s.stop_token_ids), ("logit_bias", s.logit_bias), ("allowed_token_ids", ends)):
        bad = [t for t in ids if not 0 <= t < model.vocab_size]
        if bad:
            raise _invalid(name, f"token id {bad[0]} is not in the vocabulary of {model.vocab_size}; leave it out")
    stops = set(s.stop_token_ids) | (set() if s.ignore_eos else model.eos_token_ids)
    bad_words = raw.bad_words or ()
    _check_masks(raw, bad_words, stops, model)
    if s.prompt_logprobs is not None:
        _check_prompt_logprobs(s.prompt_logprobs, len(prompt), model)
    return Request(
        request_id=request_id,
        prompt=prompt,
        sampling=Sampling(
            max_tokens=max_tokens,
            temperature=resolved("temperature", first_of(s.temperature, defaults.temperature, s.unset_temperature)),
            top_p=resolved("top_p", first_of(s.top_p, defaults.top_p, 1.0)),
            top_k=int(first_of(s.top_k, defaults.top_k, 0)),
            min_p=first_of(s.min_p, defaults.min_p, 0.0),
            min_tokens=s.min_tokens or 0,
            stop_token_ids=tuple(sorted(stops)),
            stop=tuple(x for x in s.stop if x),  # some clients send "" for none
            seed=s.seed if s.seed is not None else rng.getrandbits(63),
            repetition_penalty=first_of(s.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=s.presence_penalty or 0.0,
            frequency_penalty=s.frequency_penalty or 0.0,
            logprobs=s.logprobs,
            prompt_logprobs=s.prompt_logprobs if raw.first is None else None,  # they are given once
            logit_bias=tuple(sorted((t, b) for t, b in s.logit_bias.items() if b != 0)),
            allowed_token_ids=allowed,
            bad_words=bad_words,
            include_stop=s.include_stop,
            skip_special=s.skip_special,
            goes_on=raw.first.sampling.goes_on if raw.first is not None else bool(raw.chat and raw.chat.continue_final),
            structured=s.structured,
            beams=s.beams,
        ),
        arrived=now,
        deadline=now + deadline_s(raw, config, grpc_deadline_s),
        priority=raw.priority,
        cache_salt=raw.cache_salt,
        traceparent=traceparent,
        operation=raw.first.operation if raw.first is not None else "text_completion" if raw.chat is None else "chat",
        prompt_cache_key=raw.prompt_cache_key,
        emitted=emitted,
        revision=begun_on,
        adapter=adapter,
        again=raw.first is not None,
        beside="" if raw.first is None else raw.first.key,
        answer=raw.which,
        tools=raw.offers_tools,
    )


def _begun_on(raw: RawRequest, model: ServedModel) -> tuple[str, str]:
    """Revision and adapter of what there is of the answer; without one, the adapter that is asked for by name.

    A key is asked for the name alone (router/access/gate.py): the answer goes on with what has had that name, or not.
    """
    if raw.first is not None:
        return "", raw.first.adapter
    _check_model(raw, model)  # once more: those that woke up for it may have other adapters
    named = model.adapters.get(raw.model, "")
    if not raw.emitted_token_ids or not raw.revision:
        return "", named
    revision, _, adapter = raw.revision.partition("#")
    if adapter == named or adapter in model.older.get(raw.model, ()):
        return revision, adapter
    if adapter and named:
        why = f"no worker that is known here has the adapter {raw.model!r} that this answer began on"
        fix = "retry, or ask anew without what has come"
        raise refuse(Code.UNAVAILABLE, f"{why}; {fix}", field="revision", retry_after_ms=_COME_AGAIN_MS)
    begun = "on an adapter" if adapter else "on the model alone"
    asked = f"the adapter {raw.model!r}" if named else "the model alone"
    why = f"this answer began {begun}, and the request is for {asked}; send `model` as the first time"
    raise _invalid("revision", why)


def _kept(raw: RawRequest, prompt: Sequence[int], config: RouterConfig, model: ServedModel) -> Sequence[int]:
    """The end of the prompt, as far as the request wants it. -1: as far as it fits beside the answer."""
    kept = raw.truncate_prompt_tokens
    if kept is None or raw.first is not None:
        return prompt
    if kept == -1:
        s, limit = raw.sampling, model.context_limit_tokens
        kept = limit - (s.max_tokens or min(s.default_max_tokens or config.default_max_tokens, limit // 2))
    if not 0 < kept < len(prompt):
        return prompt  # none fits: the limits say so
    front = raw.front_tokens if raw.front_tokens < kept else 0
    rest = prompt[len(prompt) - kept + front :]
    if not isinstance(prompt, np.ndarray):
        return [*prompt[:front], *rest]  # an array of none and of these would be of floats
    return cast("Sequence[int]", np.concatenate((prompt[:front], rest)))  # a view would hold the whole of it


def _check_masks(raw: RawRequest, bad_words: Sequence[tuple[int, ...]], stops: set[int], model: ServedModel) -> None:
    s = raw.sampling
    if not s.allowed_token_ids and not bad_words:
        return
    name = "allowed_token_ids" if s.allowed_token_ids else "bad_words"
    if not model.masks_tokens:
        why = f"a worker of an older version does not know {name}; retry when all are upgraded, or leave it out"
        raise refuse(Code.UNAVAILABLE, why, field=name, retry_after_ms=10_000)
    if not s.allowed_token_ids or raw.first is not None:
        return
    left = set(s.allowed_token_ids).difference(*(word for word in bad_words if len(word) == 1))
    if not left:
        raise _invalid(name, "all of allowed_token_ids are bad words; allow another token")
    if s.min_tokens and left <= stops:
        why = f"all of allowed_token_ids end the answer, and min_tokens is {s.min_tokens}"
        raise _invalid(name, f"{why}; allow another token, or leave min_tokens out")


def _check_prompt_logprobs(alternatives: int, prompt_tokens: int, model: ServedModel) -> None:
    name = "prompt_logprobs"
    if not model.scores_prompts:
        why = f"a worker of an older version does not know {name}; retry when all are upgraded, or leave it out"
        raise refuse(Code.UNAVAILABLE, why, field=name, retry_after_ms=10_000)
    entries = prompt_tokens * (1 + alternatives)
    if entries > MAX_PROMPT_LOGPROBS:
        fix = "ask for fewer alternatives, or shorten the prompt"
        what = f"{prompt_tokens} prompt tokens with {alternatives} alternatives each are {entries} log-probabilities"
        raise _invalid(name, f"{what}, the limit is {MAX_PROMPT_LOGPROBS}; {fix}")


def _unknown_token(raw: RawRequest, token_id: int, model: ServedModel) -> RequestRefused:
    where = f"the model's vocabulary of {model.vocab_size}"
    if raw.text is None and raw.chat is None:
        return _invalid("token_ids", f"token id {token_id} is not in {where}; tokenize anew")
    return _invalid(
        "chat" if raw.text is None else "text",
        f"the tokenizer makes token id {token_id} of this prompt, which is not in {where}; leave out what spells it, "
        "or put the tokenizer that the model was trained with into its directory",
    )


def _our_max_tokens(
    raw: RawRequest, prompt_tokens: int, room: int, config: RouterConfig, left: TokensLeft | None
) -> int:
    """For a request that names none: never a reason to refuse what would have fitted with less.

    What a key has left is shared by the answers or beams; but none is cut below the usual because others run: it waits.
    """
    s = raw.sampling
    if raw.first is not None:
        return raw.first.sampling.max_tokens  # which left room for this one
    wanted = room if s.fill_context else min(s.default_max_tokens or config.default_max_tokens, room)
    wanted = min(wanted, s.most_by_default or wanted)
    if left is None:
        return wanted
    usual = max(config.default_max_tokens, s.min_tokens or 0, len(raw.emitted_token_ids) + 1)
    shares = raw.answers if s.beams is None else s.beams.width
    least = max(1, min(wanted, usual, (left.a_minute - prompt_tokens) // shares))
    return min(wanted, max(least, (left.now - prompt_tokens) // shares))


def first_of(asked: float | None, models: float | None, otherwise: float) -> float:
    """The client's word, else the model author's, else ours."""
    return asked if asked is not None else models if models is not None else otherwise


def deadline_s(raw: RawRequest, config: RouterConfig, grpc_deadline_s: float | None) -> float:
    """The request's own, else the call's, else the default; never later than the call's or the maximum."""
    wanted = raw.deadline_ms / 1e3 if raw.deadline_ms else grpc_deadline_s or config.default_deadline_s
    bounds = [wanted, config.max_deadline_s]
    if grpc_deadline_s is not None:
        bounds.append(grpc_deadline_s)
    return max(0.0, min(bounds))


def _invalid(name: str, message: str, reason: str = "") -> RequestRefused:
    return refuse(Code.INVALID_ARGUMENT, message, field=name, reason=reason)
