"""What of a request a beam search goes by, and what it has no meaning for."""

from __future__ import annotations

from typing import Any

from router.errors import Code, RequestRefused, refuse
from router.request import Beams
from settings.sampling import LENGTH_PENALTY, MAX_BEAMS

_MAX_ENDS = 64  # as engine/beam_search.py
# What samples, or shapes the distribution: with the values that do neither.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0, 1),
    "top_p": (None, 1),
    "top_k": (None, 0),
    "min_p": (None, 0),
    "repetition_penalty": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": ({},),
    "allowed_token_ids": ((),),
    "bad_words": ((),),
    "stop": ((), ("",)),
    "structured": (None,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
}


def beams_of(
    n: int, best_of: int | None, length_penalty: float | None, early_stopping: object, *, field: str = ""
) -> Beams:
    """As the doors' fields say it; `best_of`, or `n`, is how many beams there are. `field`: what this door calls that.
    Raises RequestRefused.
    """
    width = n if best_of is None else best_of
    if not n <= width <= MAX_BEAMS:
        name, least = field or ("n" if best_of is None else "best_of"), n if n < MAX_BEAMS else 1
        raise _invalid(name, f"{name} is {width}, and so many beams are searched; use {least} to {MAX_BEAMS}")
    if isinstance(early_stopping, bool) or early_stopping in (None, "never"):
        return Beams(width, n, 1.0 if length_penalty is None else length_penalty, early_stopping or False)  # type: ignore[arg-type]
    raise _invalid("early_stopping", 'early_stopping is none of true, false and "never"; use one of them')


def check_beams(raw: Any, ends: int, *, known: bool) -> None:
    """`raw`: a RawRequest. `ends`: tokens that end the model's answers. Raises RequestRefused."""
    sampling, beams = raw.sampling, raw.sampling.beams
    if beams is None:
        return
    if not known:
        why = "no decode worker knows beam search: they are of an older version; retry when one is upgraded"
        raise refuse(Code.UNAVAILABLE, why, field="use_beam_search", retry_after_ms=10_000)
    if beams.length_penalty not in LENGTH_PENALTY:
        why = f"length_penalty is {beams.length_penalty}; use {LENGTH_PENALTY}"
        raise _invalid("length_penalty", why)
    for name, neutral in _NEUTRAL.items():
        if getattr(sampling, name) not in neutral:
            raise _invalid(name, f"a beam search goes by the model's distribution alone, without {name}; leave it out")
    if len(raw.emitted_token_ids):
        why = "an answer that is searched for comes whole, and is not resumed; ask anew without emitted_token_ids"
        raise _invalid("emitted_token_ids", why)
    ends += len(sampling.stop_token_ids)
    if ends > _MAX_ENDS:
        raise _invalid("stop_token_ids", f"{ends} tokens end the answer, a beam search takes {_MAX_ENDS}; send fewer")


def _invalid(field: str, message: str) -> RequestRefused:
    return refuse(Code.INVALID_ARGUMENT, message, field=field)
