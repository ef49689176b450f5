"""One answer over any number of attempts: messages and errors in, chunks and delays out. No IO, no clock.

attempt ──responses──> chunks ──finished──> done
   ^                     │
   └── delay ── trouble ─┘   before the first token: the same request again
                             behind it: the request with what was emitted, and the seed that was drawn
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from diptych.client.types import Answer, Chunk, FinishReason, Options, Prompt, RequestFailed, Retrying
from diptych.v1 import generate_pb2 as pb

_PLACEMENTS = {
    "auto": pb.PLACEMENT_AUTO,
    "local": pb.PLACEMENT_LOCAL,
    "split": pb.PLACEMENT_SPLIT,
}
_FINISH: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}
_REQUEST_FIELDS = ("model", "request_id", "priority", "cache_salt", "truncate_prompt_tokens")
_EARLY_STOPPING: Mapping[Any, pb.EarlyStopping] = {
    False: pb.EARLY_STOPPING_NO,
    True: pb.EARLY_STOPPING_YES,
    "never": pb.EARLY_STOPPING_NEVER,
}
_LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")
# Codes that gRPC itself makes up when a connection breaks or a peer is not there.
_CONNECTION_CODES = ("UNAVAILABLE", "INTERNAL", "CANCELLED")


def request_of(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises TypeError or ValueError for what no request can express."""
    request = pb.GenerateRequest()
    if isinstance(prompt, pb.GenerateRequest):
        request.CopyFrom(prompt)
        if request.n > 1 or (request.best_of > 1 and not request.HasField("beam_search")):
            raise ValueError("n and best_of are not for this client: ask for each answer by itself, or use the stub")
    elif isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) and isinstance(prompt[0], Mapping):
        for message in cast("list[Mapping[str, Any]]", prompt):
            request.chat.messages.add(**message)
    else:
        request.token_ids.ids.extend(cast("list[int]", prompt))
    sampling = request.sampling
    for name, value in options.items():
        if name == "timeout_s":
            continue
        if name == "placement":
            if value not in _PLACEMENTS:
                raise ValueError(f"placement is {value!r}; use one of {', '.join(map(repr, _PLACEMENTS))}")
            request.placement = _PLACEMENTS[cast(str, value)]
        elif name in _REQUEST_FIELDS:
            setattr(request, name, value)
        elif name in _LISTS:
            getattr(sampling, name).extend([value] if isinstance(value, str) else cast("list[Any]", value))
        elif name == "logit_bias":
            sampling.logit_bias.update(cast("dict[int, float]", value))
        elif name == "structured":
            sampling.structured.CopyFrom(cast(pb.StructuredOutput, value))
        elif name == "beams":
            request.best_of = cast(int, value)
            request.beam_search.SetInParent()
        elif name == "length_penalty":
            request.beam_search.length_penalty = cast(float, value)
        elif name == "early_stopping":
            request.beam_search.early_stopping = _EARLY_STOPPING[value]
        elif name in Options.__annotations__:
            setattr(sampling, name, value)
        else:
            known = ", ".join(sorted(Options.__annotations__))
            raise TypeError(f"option {name!r} does not exist; there are {known}")
    return request


@dataclass(frozen=True, slots=True)
class Trouble:
    """How an attempt ended. `by_server`: Diptych said so, and not gRPC about a connection."""

    code: str
    message: str
    by_server: bool
    retry_after_s: float = 0.0
    field: str = ""


class RetryBudget:
    """All requests of a client share it."""

    def __init__(self, retrying: Retrying) -> None:
        self._share, self._burst = retrying.share, retrying.burst
        self._saved = retrying.burst

    def request_came(self) -> None:
        self._saved = min(self._burst, self._saved + self._share)

    def spend(self) -> bool:
        if self._saved < 1:
            return False
        self._saved -= 1
        return True


class Answering:
    """`timeout_s`: of the whole answer. `now` is on any monotonic clock, the same in all calls."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        timeout_s: float,
        retrying: Retrying,
        budget: RetryBudget,
        rng: random.Random,
        now: float,
    ) -> None:
        self.answer = Answer()
        self.done = False
        self._request = request
        if request.deadline_ms:
            timeout_s = min(timeout_s, request.deadline_ms / 1e3)
        self._timeout_s = timeout_s
        self._deadline = now + timeout_s
        self._retrying = retrying
        self._budget = budget
        self._rng = rng
        self._attempts = 0
        self._heard_chars = 0  # of the answer's text, in this attempt
        self._stalled_since: float | None = None  # the first trouble since the last token
        self._refusals = 0  # since the last token
        self._failures = 0
        budget.request_came()

    def attempt(self, now: float) -> tuple[pb.GenerateRequest, float]:
        """What to send, and its gRPC deadline in seconds. Raises RequestFailed when no time is left."""
        left = self._deadline - now
        if left <= 0:
            raise self._failed(
                Trouble("DEADLINE_EXCEEDED", f"no whole answer within {self._timeout_s:g} s; allow more time", False)
            )
        self._attempts += 1
        self._heard_chars = 0
        if self._attempts == 1:
            return self._request, left
        self.answer.retries += 1
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if request.deadline_ms:
            request.deadline_ms = max(1, int(left * 1e3))
        if self.answer.token_ids:
            self.answer.resumes += 1
            request.sampling.seed = self.answer.seed
            request.revision = self.answer.revision
            if request.truncate_prompt_tokens == -1:  # what fits may be another number by now
                request.truncate_prompt_tokens = self.answer.prompt_tokens
            del request.emitted_token_ids[:]
            request.emitted_token_ids.extend([*self._request.emitted_token_ids, *self.answer.token_ids])
        return request, left

    def hear(self, response: pb.GenerateResponse) -> Chunk | None:
        """Raises RequestFailed for an answer that does not fit what came before."""
        match response.WhichOneof("event"):
            case "started":
                return self._started(response.started)
            case "tokens":
                return self._tokens(response.tokens)
            case "prompt_logprobs":
                self.answer.prompt_logprobs = response.prompt_logprobs
            case "finished":
                finished, answer = response.finished, self.answer
                answer.finish_reason = _FINISH.get(finished.reason, "stop")
                answer.usage, answer.timings, answer.route = finished.usage, finished.timings, finished.route
                answer.recoveries = finished.recoveries
                self.done = True
                self._check_scored()
        return None

    def ended(self) -> Trouble:
        """The stream is over and said neither `finished` nor an error."""
        return Trouble("UNAVAILABLE", "the stream ended without its last message", False)

    def trouble(self, trouble: Trouble, now: float, *, elsewhere: bool = False) -> float:
        """Seconds to wait before the next attempt: none, if it goes to another router that is not known to be in
        trouble. Raises RequestFailed where no attempt would help.
        """
        if not self._may_help(trouble):
            raise self._failed(trouble)
        if self._stalled_since is None:
            self._stalled_since = now
            self._failures = self._refusals = 0
        if trouble.by_server:
            self._refusals += 1
            if self._refusals > 1 and not self._budget.spend():
                raise self._failed(trouble, "; not retried: too many of this client's requests are being retried")
        retrying = self._retrying
        delay = min(retrying.max_delay_s, retrying.first_delay_s * 2**self._failures) * self._rng.uniform(0.5, 1.5)
        delay = 0.0 if elsewhere else max(delay, trouble.retry_after_s)
        self._failures += 1
        if now + delay - self._stalled_since > retrying.patience_s or now + delay >= self._deadline:
            tried = f"; given up after {self._attempts} attempts" if self._attempts > 1 else ""
            raise self._failed(trouble, tried)
        return delay

    def _may_help(self, trouble: Trouble) -> bool:
        if not trouble.by_server:
            return trouble.code in _CONNECTION_CODES
        if trouble.code == "ALREADY_EXISTS":  # under our own id: the router has not noticed yet that its stream broke
            return self._attempts > 1
        if trouble.code == "FAILED_PRECONDITION" and trouble.field == "placement":  # the prefill pool is not there
            return self._attempts > 1  # a router that has just started may not know it yet
        return trouble.code == "UNAVAILABLE" or trouble.retry_after_s > 0

    def _failed(self, trouble: Trouble, more: str = "") -> RequestFailed:
        return RequestFailed(
            trouble.code,
            trouble.message + more,
            self.answer,
            field=trouble.field,
            retry_after_s=trouble.retry_after_s,
        )

    def _check_scored(self) -> None:
        """A router of an older version leaves out what it does not know, and says nothing."""
        asked = self._request.sampling.HasField("prompt_logprobs") and not self._request.emitted_token_ids
        if asked and self.answer.prompt_logprobs is None:
            raise self._failed(
                Trouble(
                    "UNIMPLEMENTED",
                    "the answer came without the log-probabilities of the prompt: the router is of a version that does "
                    "not know them; upgrade it, or leave prompt_logprobs out",
                    False,
                    field="prompt_logprobs",
                )
            )

    def _started(self, started: pb.Started) -> Chunk | None:
        answer = self.answer
        if answer.token_ids and started.prompt_tokens != answer.prompt_tokens:
            raise self._failed(
                Trouble(
                    "FAILED_PRECONDITION",
                    f"the prompt had {answer.prompt_tokens} tokens and has {started.prompt_tokens} now that the answer "
                    "was to go on: tokenizer or chat template have changed; ask anew",
                    False,
                )
            )
        answer.request_id, answer.route = started.request_id, started.route
        answer.prompt_tokens, answer.seed = started.prompt_tokens, started.seed
        answer.revision = started.revision or answer.revision
        if answer.token_ids or started.text:
            return self._text(len(answer.token_ids), (), started.text, ())
        return None

    def _tokens(self, tokens: pb.Tokens) -> Chunk | None:
        answer = self.answer
        before = len(self._request.emitted_token_ids)
        due = before + len(answer.token_ids)
        if tokens.token_ids and tokens.position != due:
            raise self._failed(
                Trouble("INTERNAL", f"position {tokens.position} came where {due} was due; report this", True)
            )
        if tokens.token_ids:
            self._stalled_since = None
            answer.token_ids.extend(tokens.token_ids)
            answer.logprobs.extend(tokens.logprobs)
        return self._text(due - before, tuple(tokens.token_ids), tokens.text, tuple(tokens.logprobs))

    def _text(
        self, position: int, token_ids: tuple[int, ...], text: str, logprobs: tuple[pb.TokenLogprobs, ...]
    ) -> Chunk | None:
        """An attempt says the answer's text from the beginning: what is known already is left out."""
        known = len(self.answer.text) - self._heard_chars
        self._heard_chars += len(text)
        new = text[known:] if known > 0 else text
        self.answer.text += new
        return Chunk(position, token_ids, new, logprobs) if new or token_ids else None
