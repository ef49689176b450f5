"""Named tensors -> a request of ours. The names are those of Triton's LLM backends (TensorRT-LLM and vLLM).

What cannot be done here is refused with its name; what has no meaning here and changes no answer is accepted (`pad_id`,
`length_penalty` without beams). docs/open-inference.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.admission import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, RawRequest, RawSampling
from router.beams import beams_of
from router.doors.open_inference.tensors import TensorSpec, invalid, shown, text_of
from settings.sampling import MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORDS

INPUTS: Mapping[str, TensorSpec] = {
    "text_input": TensorSpec("BYTES"),
    "stream": TensorSpec("BOOL"),
    "max_tokens": TensorSpec("INT32"),
    "min_tokens": TensorSpec("INT32"),
    "temperature": TensorSpec("FP32"),
    "top_p": TensorSpec("FP32"),
    "top_k": TensorSpec("INT32"),
    "min_p": TensorSpec("FP32"),
    "seed": TensorSpec("UINT64"),
    "random_seed": TensorSpec("UINT64"),
    "repetition_penalty": TensorSpec("FP32"),
    "presence_penalty": TensorSpec("FP32"),
    "frequency_penalty": TensorSpec("FP32"),
    "stop_words": TensorSpec("BYTES", MAX_STOP_STRINGS),
    "bad_words": TensorSpec("BYTES", MAX_BAD_WORDS),
    "end_id": TensorSpec("INT32"),
    "sampling_parameters": TensorSpec("BYTES"),
    "exclude_input_in_output": TensorSpec("BOOL"),
    "return_finish_reason": TensorSpec("BOOL"),
    "return_num_input_tokens": TensorSpec("BOOL"),
    "return_num_output_tokens": TensorSpec("BOOL"),
    "beam_width": TensorSpec("INT32"),
    "length_penalty": TensorSpec("FP32"),
    "early_stopping": TensorSpec("BOOL"),
    # Accepted where they change no answer:
    "pad_id": TensorSpec("INT32"),
    "return_log_probs": TensorSpec("BOOL"),
    "return_context_logits": TensorSpec("BOOL"),
    "return_generation_logits": TensorSpec("BOOL"),
}
OUTPUTS: Mapping[str, TensorSpec] = {
    "text_output": TensorSpec("BYTES"),
    "finish_reason": TensorSpec("BYTES"),
    "num_input_tokens": TensorSpec("UINT32"),
    "num_output_tokens": TensorSpec("UINT32"),
}
MAX_ANSWERS = 128  # to one prompt
_USUAL_OUTPUTS = ("text_output", "finish_reason")

_MAX_JSON_BYTES = 64 << 10
_INTEGER_LIMITS = {"seed": 1 << 64}  # exclusive; others are 32 bit
_JSON_NUMBERS = {
    "temperature": float, "top_p": float, "min_p": float, "repetition_penalty": float, "presence_penalty": float,
    "frequency_penalty": float, "length_penalty": float, "top_k": int, "max_tokens": int, "min_tokens": int,
    "seed": int,
}  # fmt: skip
_JSON_BOOLEANS = {
    "ignore_eos": "ignore_eos",
    "use_beam_search": "use_beam_search",
    "include_stop_str_in_output": "include_stop",
    "skip_special_tokens": "skip_special",
}
_JSON_OTHERS = (
    "n",
    "best_of",
    "early_stopping",
    "stop",
    "stop_token_ids",
    "allowed_token_ids",
    "bad_words",
    *_JSON_BOOLEANS,
)
# vLLM's names whose default does nothing: a client may send them as long as they stay at it.
_JSON_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "prompt_logprobs": (None,),
    "logprobs": (None,),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request, and how its answer is to come. `prefix`: text that the first response begins with. `n`: answers."""

    raw: RawRequest
    stream: bool
    outputs: tuple[str, ...]
    prefix: str = ""
    n: int = 1


def wanted_from(
    inputs: Mapping[str, Sequence[Any]],
    outputs: Sequence[str],
    *,
    model: str = "",
    priority: int = 0,
    timeout_us: int = 0,
) -> Wanted:
    """`inputs`: each tensor's elements, checked against INPUTS. Raises RequestRefused."""
    if "text_input" not in inputs:
        raise invalid("text_input", "the request has no input 'text_input'; send the prompt in it, BYTES of shape [1]")
    _refuse_what_is_not_here(inputs)
    text = text_of("text_input", inputs["text_input"][0])
    stream = bool(_one(inputs, "stream", False))
    exclude = bool(_one(inputs, "exclude_input_in_output", True))
    if stream and not exclude:
        raise invalid(
            "exclude_input_in_output",
            "a stream cannot repeat the prompt; set 'exclude_input_in_output' to true, or 'stream' to false",
        )
    sampling, n = _sampling(inputs)
    if n > 1 and stream:
        raise invalid("n", f"'n' is {n}: several answers come whole; set 'stream' to false, or leave 'n' out")
    return Wanted(
        RawRequest(
            model=model,
            text=text,
            sampling=sampling,
            answers=n,
            priority=_priority(priority),
            deadline_ms=_deadline_ms(timeout_us),
        ),
        stream,
        _outputs(inputs, outputs),
        "" if exclude else text,
        n,
    )


def _refuse_what_is_not_here(inputs: Mapping[str, Sequence[Any]]) -> None:
    for name in ("return_log_probs", "return_context_logits", "return_generation_logits"):
        if _one(inputs, name, False):
            raise invalid(name, f"{name!r} is not available here; leave it out, or use GenerateService for logprobs")


def _sampling(inputs: Mapping[str, Sequence[Any]]) -> tuple[RawSampling, int]:
    """Tensors, or vLLM's JSON; a value in both is refused unless it is the same. And how many answers."""
    values: dict[str, Any] = {}
    for name in _JSON_NUMBERS:
        if name in inputs:
            values[name] = _number(name, f"input {name!r}", inputs[name][0])
    if "random_seed" in inputs:
        _merge(values, "seed", _number("seed", "input 'random_seed'", inputs["random_seed"][0]))
    stop = tuple(s for s in (text_of("stop_words", s) for s in inputs.get("stop_words", ())) if s)
    if stop:
        values["stop"] = stop
    bad_words = tuple(s for s in (text_of("bad_words", s) for s in inputs.get("bad_words", ())) if s)
    if bad_words:
        values["bad_words"] = bad_words
    end_id = _one(inputs, "end_id", -1)
    if end_id >= 0:
        values["stop_token_ids"] = (end_id,)
    if "sampling_parameters" in inputs:
        for name, value in _json_sampling(text_of("sampling_parameters", inputs["sampling_parameters"][0])).items():
            _merge(values, name, value)
    return _searched(inputs, values)


def _searched(inputs: Mapping[str, Sequence[Any]], values: dict[str, Any]) -> tuple[RawSampling, int]:
    """TensorRT-LLM's `beam_width` above 1 is a search whose beams are all given; vLLM's `use_beam_search` has `n` or
    `best_of` beams, of which `n` are given.
    """
    width = _one(inputs, "beam_width", 1)
    if width < 1:
        raise invalid("beam_width", f"'beam_width' is {width}; use a number from 1 on")
    for name in ("length_penalty", "early_stopping"):
        if name in inputs:
            _merge(values, name, inputs[name][0])
    n, best_of = values.pop("n", None), values.pop("best_of", None)
    penalty, early = values.pop("length_penalty", 1.0), values.pop("early_stopping", False)
    if not values.pop("use_beam_search", width > 1):
        if best_of not in (None, 1):
            raise invalid("best_of", "'best_of' is not available here without beam search; leave it out")
        return RawSampling(**values), n or 1
    if width == 1:
        beams = beams_of(n or 1, best_of, penalty, early)
    else:
        beams = beams_of(n or width, width, penalty, early, field="beam_width")
    return RawSampling(**values, beams=beams), beams.answers


def _merge(values: dict[str, Any], name: str, value: Any) -> None:
    if values.get(name, value) != value:
        raise invalid(name, f"{name!r} is given twice, as {values[name]} and as {value}; send it once")
    values[name] = value


def _json_sampling(text: str) -> dict[str, Any]:
    where = "input 'sampling_parameters'"
    if len(text) > _MAX_JSON_BYTES:
        raise invalid("sampling_parameters", f"{where} is longer than {_MAX_JSON_BYTES} characters; send less")
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise invalid("sampling_parameters", f"{where} is not JSON ({error}); send one object") from None
    if not isinstance(found, dict):
        raise invalid("sampling_parameters", f"{where} is a JSON {type(found).__name__}; send one object")
    values: dict[str, Any] = {}
    for name, value in found.items():
        if name in _JSON_NUMBERS:
            if value is not None:
                values[name] = _number(name, f"{name!r} in {where}", value)
        elif name == "n":
            n = values["n"] = 1 if value is None else _number("n", f"'n' in {where}", value, int)
            if not 1 <= n <= MAX_ANSWERS:
                raise invalid("n", f"'n' in {where} is {n}; use 1 to {MAX_ANSWERS}")
        elif name == "stop":
            if value is not None:
                values["stop"] = _strings(where, value)
        elif name == "bad_words":
            if value:
                values["bad_words"] = _strings(where, value, name, MAX_BAD_WORDS)
        elif name == "stop_token_ids":
            if value is not None:
                values["stop_token_ids"] = _token_ids(where, value)
        elif name == "allowed_token_ids":
            if value is not None:
                values[name] = _token_ids(where, value, name, MAX_ALLOWED_TOKEN_IDS)
                if not value:
                    raise invalid(name, f"{name!r} in {where} is empty; name at least one token, or leave it out")
        elif name == "best_of":
            values[name] = None if value is None else _number(name, f"'best_of' in {where}", value, int)
        elif name == "early_stopping":
            if not isinstance(value, bool) and value not in (None, "never"):
                raise invalid(name, f'{name!r} in {where} is none of true, false and "never"; use one of them')
            values[name] = value or False
        elif name in _JSON_BOOLEANS:
            if not isinstance(value, bool):
                raise invalid(name, f"{name!r} in {where} is not a boolean; use true or false")
            values[_JSON_BOOLEANS[name]] = value
        elif name not in _JSON_NEUTRAL:
            known = ", ".join(sorted({*_JSON_NUMBERS, *_JSON_OTHERS}))
            raise invalid(name, f"{where} has {shown(name)}, which does not exist here; known are {known}")
        elif value not in _JSON_NEUTRAL[name]:
            raise invalid(name, f"{name!r} in {where} is not available here; leave it out")
    return values


def _strings(where: str, value: Any, name: str = "stop", most: int = MAX_STOP_STRINGS) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise invalid(name, f"{name!r} in {where} is of another type; send a string or a list of strings")
    if len(strings) > most:
        raise invalid(name, f"{len(strings)} strings in {name!r}, the limit is {most}; send fewer")
    return tuple(strings)


def _token_ids(where: str, value: Any, name: str = "stop_token_ids", most: int = MAX_STOP_TOKEN_IDS) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise invalid(name, f"{name!r} in {where}; send a list of up to {most} ids")
    return tuple(_number(name, f"a token id in {where}", one, int) for one in value)


def _number(name: str, what: str, value: Any, kind: type | None = None) -> Any:
    """vLLM's own examples send numbers as strings, so those are read too."""
    kind = kind or _JSON_NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise invalid(name, f"{what} is not a number; send one")
    if isinstance(value, str):
        try:
            value = kind(value)
        except ValueError:
            raise invalid(name, f"{what} is {shown(value)}; send a number") from None
    if kind is int:
        if isinstance(value, float) and not value.is_integer():
            raise invalid(name, f"{what} is {value}; send a whole number")
        value = int(value)
        if name == "top_k" and value == -1:
            return 0  # vLLM: off
        if not 0 <= value < _INTEGER_LIMITS.get(name, 1 << 31):
            raise invalid(name, f"{what} is {value if abs(value) < 1 << 64 else 'huge'}; use a number >= 0 that fits")
        return value
    try:
        return float(value)
    except OverflowError:
        raise invalid(name, f"{what} is too large; send a smaller number") from None


def _outputs(inputs: Mapping[str, Sequence[Any]], requested: Sequence[str]) -> tuple[str, ...]:
    for name in requested:
        if name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise invalid("outputs", f"output {shown(name)} does not exist; known are {known}")
    if requested:
        return tuple(dict.fromkeys(requested))
    extra = tuple(f"num_{d}_tokens" for d in ("input", "output") if _one(inputs, f"return_num_{d}_tokens", False))
    return _USUAL_OUTPUTS + extra


def _priority(priority: int) -> int:
    """Triton's 0 is the default and 1 the highest of its levels; a higher number is less urgent."""
    if not 0 <= priority <= 100:
        raise invalid("priority", f"parameter 'priority' is {priority}; use 0 (default) to 100, where 1 is the highest")
    return -(priority - 1) if priority else 0


def _deadline_ms(timeout_us: int) -> int:
    if not 0 <= timeout_us <= 3_600_000_000_000:
        raise invalid("timeout", f"parameter 'timeout' is {timeout_us}; use microseconds, or 0 for none")
    return max(1, timeout_us // 1000) if timeout_us else 0


def _one(inputs: Mapping[str, Sequence[Any]], name: str, default: Any) -> Any:
    return inputs[name][0] if name in inputs else default
