"""The fields that chat completions and completions share, and how they become the router's."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from grammar.structured import Structured
from router.admission import MAX_LOGIT_BIASES, MAX_STOP_STRINGS, RawRequest, RawSampling
from router.beams import beams_of
from router.doors.http.app import Exchange
from router.doors.http.errors import ApiError, invalid, of_failure
from router.doors.http.parse import Body
from router.doors.http.structured import ResponseFormat, structured_outputs_of
from router.errors import RequestRefused
from router.placement.policy import Placement
from router.request import Beams
from settings.sampling import MAX_LOGPROBS

MAX_CHOICES = 128
_TIERS = {"auto": 0, "default": 0, "scale": 0, "flex": -50, "priority": 50, "fast": 50}
_SEEDS = 1 << 64

# int32 and float32 are what the wire has; more than that is a slip, and gets a better word here than there.
Int = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Float = Annotated[float, Field(ge=-1e30, le=1e30)]


UNSET_TEMPERATURE = 1.0  # OpenAI's


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampled(Body):
    """What every API that answers with text understands."""

    format_param: ClassVar[str] = "response_format"

    model: str | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    min_tokens: Int | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=_SEEDS)] | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Float] | None = None
    structured_outputs: dict[str, Any] | None = None
    stop_token_ids: list[Int] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    truncate_prompt_tokens: Int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    stream: bool | None = None
    service_tier: str | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    spaces_between_special_tokens: bool | None = None
    user: Any = None
    metadata: Any = None
    prompt_cache_key: str | None = None
    session_id: str | None = None
    stream_interval: Any = None
    mm_payload: Any = None
    return_mm_kwargs: Any = None

    @property
    def wanted_priority(self) -> int:
        if self.service_tier is not None and self.service_tier not in _TIERS:
            raise invalid("service_tier", f"service_tier {self.service_tier[:100]!r} does not exist; use {_names()}")
        return self.priority if self.priority is not None else _TIERS[self.service_tier or "default"]

    def sampling(
        self, *, max_tokens: int | None, logprobs: int | None, fill_context: bool, prompt_logprobs: int | None = None
    ) -> RawSampling:
        """Raises ApiError for what RawSampling cannot express; the rest is checked at admission."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > MAX_STOP_STRINGS:
            raise invalid("stop", f"{len(stop)} stop strings, the limit is {MAX_STOP_STRINGS}; send fewer")
        for name, value in (("max_tokens", max_tokens), ("min_tokens", self.min_tokens)):
            if value is not None and value < 0:
                raise invalid(name, f"{name} is {value}; use a number >= 0")
        if self.top_k is not None and self.top_k < -1:
            raise invalid("top_k", f"top_k is {self.top_k}; use a number >= 0, where 0 is off")
        bad = next((t for t in self.stop_token_ids or () if t < 0), None)
        if bad is not None:
            raise invalid("stop_token_ids", f"token id {bad} is negative; leave it out")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise invalid("allowed_token_ids", "allowed_token_ids is empty; name at least one token, or leave it out")
        beams = self.wanted_beams()
        return RawSampling(
            temperature=self.temperature,
            unset_temperature=UNSET_TEMPERATURE,
            top_p=self.top_p,
            top_k=max(self.top_k, 0) if self.top_k is not None else None,
            min_p=self.min_p,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=self.seed % _SEEDS if self.seed is not None else None,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            fill_context=fill_context and beams is None,  # which take room for each
            logit_bias=self._logit_bias(),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            include_stop=bool(self.include_stop_str_in_output),
            skip_special=self.skip_special_tokens is not False,
            structured=self._structured(),
            beams=beams,
        )

    def wanted_beams(self) -> Beams | None:
        """None: nothing is searched for."""
        return None

    def _logit_bias(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        if len(biases) > MAX_LOGIT_BIASES:
            raise invalid("logit_bias", f"{len(biases)} biased tokens, the limit is {MAX_LOGIT_BIASES}; send fewer")
        bad = next((k for k in biases if not (k.isascii() and k.isdigit() and len(k) < 10)), None)
        if bad is not None:
            raise invalid("logit_bias", f"{bad[:100]!r} is not a token id; the keys of logit_bias are token ids")
        return {int(k): v for k, v in biases.items()}

    def _structured(self) -> Structured | None:
        asked = self.asked_format()
        if self.structured_outputs is None:
            return asked
        if asked is not None:
            raise invalid("structured_outputs", f"structured_outputs and {self.format_param} are both set; send one")
        return structured_outputs_of(self.structured_outputs)

    def asked_format(self) -> Structured | None:
        """OpenAI's own way to ask for one."""
        return None

    def raw(self, exchange: Exchange, sampling: RawSampling) -> RawRequest:
        """All but the prompt. Raises ApiError."""
        if self.request_id:
            exchange.name(self.request_id)
        return RawRequest(
            model=self.model or "",
            sampling=sampling,
            priority=self.wanted_priority,
            deadline_ms=_deadline_ms(exchange.header(b"x-deadline-ms")),
            cache_salt=self.cache_salt or "",
            prompt_cache_key=self.prompt_cache_key or self.session_id or "",
            placement=_placement(exchange.header(b"x-diptych-placement")),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )

    @property
    def params(self) -> dict[str, str]:
        """What this request calls the fields that the router names."""
        if self.structured_outputs is not None:
            return {"structured": "structured_outputs"}
        return {"structured": self.format_param, "structured_code": "invalid_json_schema"}


class Common(Sampled):
    """Of chat completions and completions."""

    max_tokens: Int | None = None
    n: Int | None = None
    best_of: Int | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: Float | None = None
    early_stopping: bool | str | None = None
    prompt_logprobs: Int | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def streams(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options is for streams; send stream: true, or leave it out")
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def answers(self) -> int:
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise invalid("n", f"n is {self.n}; use 1..{MAX_CHOICES}")
        return self.n or 1

    @property
    def generated(self) -> int:
        """Answers to each prompt, of which the best `answers` are given."""
        n = self.answers
        if self.use_beam_search:
            return n  # the search knows which are best
        best_of = n if self.best_of is None else self.best_of
        if not n <= best_of <= MAX_CHOICES:
            raise invalid("best_of", f"best_of is {best_of}; use n ({n}) to {MAX_CHOICES}, or leave it out")
        if best_of > n and self.stream:
            raise invalid("best_of", "which answers are best is known at their end; send stream: false, or no best_of")
        return best_of

    def wanted_beams(self) -> Beams | None:
        if not self.use_beam_search:
            for name, neutral in (("length_penalty", (None, 1)), ("early_stopping", (None, False))):
                if getattr(self, name) not in neutral:
                    raise invalid(name, f"{name} is for beam search; send use_beam_search: true, or leave it out")
            return None
        try:
            return beams_of(self.answers, self.best_of, self.length_penalty, self.early_stopping)
        except RequestRefused as error:
            raise of_failure(error.failure, {}) from None

    def compared(self, logprobs: int | None) -> int | None:
        """`logprobs` as asked for, or those that a choice of the best needs."""
        return 0 if logprobs is None and self.generated > self.answers else logprobs

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        wanted = self.prompt_logprobs
        if wanted is not None and not 0 <= wanted <= MAX_LOGPROBS:
            raise invalid("prompt_logprobs", f"prompt_logprobs is {wanted}; use 0..{MAX_LOGPROBS}")
        if wanted is not None and self.stream:
            raise invalid("prompt_logprobs", "prompt_logprobs are not part of streams; send stream: false")
        return wanted

    def asked_format(self) -> Structured | None:
        return self.response_format.structured("response_format") if self.response_format is not None else None


def _names() -> str:
    return ", ".join(_TIERS)


def _placement(header: str) -> Placement:
    """Of x-diptych-placement: experiments and tests pin one. Raises ApiError."""
    try:
        return Placement(header) if header else Placement.AUTO
    except ValueError:
        known = ", ".join(p.value for p in Placement)
        raise ApiError(400, f"x-diptych-placement is {header[:100]!r}; use one of {known}") from None


def _deadline_ms(header: str) -> int:
    """Of x-deadline-ms: the whole answer's deadline. Raises ApiError."""
    if not header:
        return 0
    if not header.isascii() or not header.isdigit() or not 1 <= int(header[:12]) < 1 << 32:
        raise ApiError(400, f"x-deadline-ms is {header[:100]!r}; use a whole number of milliseconds from 1 on")
    return int(header)
