"""What a client gives and gets. Protobuf messages stay what they are: `usage`, `timings`, `route`, `logprobs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from diptych.v1 import generate_pb2 as pb

Placement = Literal["auto", "local", "split"]
FinishReason = Literal["", "stop", "length", "cancelled"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]] | pb.GenerateRequest
"""Text, token ids, chat messages ({"role": ..., "content": ...}), or a whole request, to which options are added."""


class Options(TypedDict, total=False):
    """Of one request. What is left out takes the server's default; generate.proto says what each does."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    logprobs: int
    prompt_logprobs: int
    ignore_eos: bool
    structured: pb.StructuredOutput
    beams: int  # the answer is searched for with so many, and comes whole
    length_penalty: float
    early_stopping: bool | Literal["never"]
    model: str
    request_id: str
    priority: int
    cache_salt: str
    truncate_prompt_tokens: int
    placement: Placement
    timeout_s: float  # of the whole answer, retries included; default: the client's


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens, and the text that became certain with them (it may be empty, and so may the ids)."""

    position: int  # of token_ids[0] in the answer
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[pb.TokenLogprobs, ...] = ()


@dataclass(slots=True)
class Answer:
    """Grows while a stream is read; whole when `finish_reason` is set. Its parts are joined over all retries."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = ""
    request_id: str = ""
    revision: str = ""  # of the model, that it is computed from
    seed: int = 0  # with the same request it gives the same answer again
    prompt_tokens: int = 0
    prompt_logprobs: pb.PromptLogprobs | None = None  # if asked for; there before the first token
    usage: pb.Usage = field(default_factory=pb.Usage)
    timings: pb.Timings = field(default_factory=pb.Timings)  # the last attempt's
    route: pb.Route = field(default_factory=pb.Route)  # the last attempt's
    retries: int = 0  # attempts after the first
    resumes: int = 0  # of these, continued behind tokens that had come
    recoveries: int = 0  # how often the router continued it after a fault, in the last attempt


class RequestFailed(Exception):
    """A request has no whole answer. `partial` is what had come.

    code           the gRPC status, for example "INVALID_ARGUMENT"
    field          the part of the request that is to blame, if the server named one
    retry_after_s  0: retrying as is will not help
    """

    def __init__(
        self, code: str, message: str, partial: Answer, *, field: str = "", retry_after_s: float = 0.0
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.partial = partial


@dataclass(frozen=True, slots=True)
class Retrying:
    """How a client retries. Only what may help: a router that is not there or leaving, a connection that broke, and
    refusals that come with a retry hint.

    patience_s       how long a request may go on trying since its last token
    first_delay_s    before the first retry; doubled each time, with jitter, never less than the server's hint
    max_delay_s      of ours; a longer hint of the server is kept
    share, burst     retries that a server answered with a refusal, beyond each request's first, are at most this share
                     of all requests, with so many saved up: an overload is not answered by a storm
    """

    patience_s: float = 30.0
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0
    share: float = 0.2
    burst: float = 20.0


NO_RETRIES = Retrying(patience_s=0.0)
