"""Every field of OpenAI's requests, and of vLLM's extensions: supported, ignored (why) or refused (how). docs/api.md is
written from here (`python -m router.doors.http.fields`; --check only compares). A test holds the tables against the
installed `openai` package and against vLLM's request classes, of the version that tests/http/vllm_fields.json names.

A refused field may still be sent as null, or with the value that asks for nothing.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.doors.http.errors import invalid


class Treatment(enum.StrEnum):
    SUPPORTED = "supported"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    treatment: Treatment
    note: str
    harmless: tuple[Any, ...] = ()  # of a refused field: values that ask for nothing


def _yes(note: str = "") -> Field:
    return Field(Treatment.SUPPORTED, note)


def _ignored(why: str) -> Field:
    return Field(Treatment.IGNORED, why)


def _no(how: str, *harmless: Any) -> Field:
    return Field(Treatment.REFUSED, how, harmless)


Fields = Mapping[str, Field]

_BOOKKEEPING = {
    "user": _ignored("a label for OpenAI's abuse monitoring; nothing here depends on it"),
    "metadata": _ignored("kept by OpenAI with stored answers; nothing is stored here"),
    "safety_identifier": _ignored("a label for OpenAI's abuse monitoring; nothing here depends on it"),
    "prompt_cache_key": _yes("keeps a session on the workers that served it last, if that costs little"),
    "prompt_cache_retention": _ignored("a prefix stays cached while there is room"),
    "prompt_cache_options": _ignored("a prefix stays cached while there is room"),
    "store": _no("nothing is stored; leave it out or send false", False),
    "moderation": _no("there is no moderation here"),
}
_SAMPLING = {
    "model": _yes(
        "the served model's name (the default), one of `router.served_model_names` or an adapter's; others get 404"
    ),
    "temperature": _yes("default: the model's own (generation_config.json), else 1; 0 is greedy"),
    "top_p": _yes("default: the model's own, else 1"),
    "seed": _yes(
        "the same seed gives the same answer, wherever it is computed; with several choices, choice i uses seed + i"
    ),
    "stop": _yes("a string or up to 16; the text ends before the match"),
    "presence_penalty": _yes(),
    "frequency_penalty": _yes(),
    "logit_bias": _yes("up to 1024 tokens"),
    "n": _yes("up to 128 answers in total"),
    "stream": _yes("server-sent events"),
    "stream_options": _yes(
        "`include_usage`; `include_obfuscation` is ignored: nothing is obfuscated; vLLM's `continuous_usage_stats` is "
        "ignored: usage comes once, at the end"
    ),
    "service_tier": _yes("`priority`, `fast` and `flex` mean priority 50, 50 and -50; all others 0"),
}
_STRUCTURED = {
    "response_format": _yes("`text`, `json_object`, `json_schema`; a schema is always enforced, `strict` or not"),
    "structured_outputs": _yes(
        "vLLM's: one of `json`, `regex`, `choice`, `grammar` (Lark, llguidance's dialect), `json_object`"
    ),
}
_EXTENSIONS = {
    "top_k": _yes("vLLM's; 0 and -1 are off"),
    "min_p": _yes("vLLM's"),
    "repetition_penalty": _yes("vLLM's"),
    "min_tokens": _yes("vLLM's"),
    "ignore_eos": _yes("vLLM's"),
    "stop_token_ids": _yes("vLLM's"),
    "cache_salt": _yes("vLLM's; requests share cached prefixes only if their salts are equal"),
    "priority": _yes("-100 to 100, higher is sooner (in vLLM lower is sooner); overrides `service_tier`"),
    "request_id": _yes("vLLM's; the same as the header `x-request-id`"),
    "session_id": _yes("vLLM's; the same as `prompt_cache_key`, which overrides it"),
    "skip_special_tokens": _yes("vLLM's; false: special tokens are part of the text, but for the one that ends it"),
    "include_stop_str_in_output": _yes(
        "vLLM's; true: what ended the answer is part of its text: a stop string or token"
    ),
    "spaces_between_special_tokens": _ignored("special tokens have no spaces around them in the text"),
    "guided_json": _no('use `structured_outputs`: {"json": ...} or `response_format`'),
    "guided_regex": _no('use `structured_outputs`: {"regex": ...}'),
    "guided_choice": _no('use `structured_outputs`: {"choice": ...}'),
    "guided_grammar": _no('use `structured_outputs`: {"grammar": ...}'),
    "use_beam_search": _yes(
        "vLLM's; true: the answers are searched for with `best_of`, or `n`, beams, 1 to 16, and come whole; see Beam "
        "search below"
    ),
    "length_penalty": _yes("vLLM's and transformers'; -5 to 5, default 1; with `use_beam_search`"),
    "early_stopping": _yes('transformers\': true, false (the default) or "never"; with `use_beam_search`'),
    "prompt_logprobs": _yes(
        "vLLM's; 0 to 20, at most 131072 log-probabilities of a prompt, and 262144 in all answers; not in streams. "
        "The prompt is computed whole, whatever of it is cached. With it `max_tokens` may be 0: no token is sampled"
    ),
    "logprob_token_ids": _no("use `top_logprobs`"),
    "logits_processors": _no("the server does not run client code", []),
    "allowed_token_ids": _yes("vLLM's; up to 4096 tokens; not with a format of the answer"),
    "bad_words": _yes(
        "vLLM's; up to 256 strings, each tokenized with a blank before it and without; other ways to write the same "
        "text with tokens are not found. Not with a format of the answer"
    ),
    "repetition_detection": _no("use `repetition_penalty`, or `max_tokens`"),
    "thinking_token_budget": _no("use `max_tokens`", -1),
    "watermarking": _no("answers have no watermark", False),
    "truncate_prompt_tokens": _yes(
        "vLLM's; the prompt's last so many tokens are kept; -1: as many as fit beside `max_tokens`, or beside its "
        "default, at most half of the context. What the tokenizer puts before every text (BOS) is kept and "
        "counts; what a chat template writes there is not kept"
    ),
    "truncation_side": _no("the end of a prompt is kept", "left"),
    "return_token_ids": _yes("vLLM's; adds `token_ids` to every choice, and `prompt_token_ids` once for every prompt"),
    "return_tokens_as_token_ids": _no("logprobs name tokens by their text and bytes", False),
    "return_token_offsets": _no("offsets of the prompt's tokens are not part of the answers", False),
    "return_prompt_text": _no("/tokenize and /detokenize show how a template renders messages", False),
    "return_weight_versions": _no("a served model's weights do not change", False),
    "routed_experts_prompt_start": _no("routed experts are not part of the answers", 0),
    "stream_interval": _ignored("an event has the tokens of one step"),
    "lora_request": _no("send the adapter's name as `model`"),
    "kv_transfer_params": _no("the router places and moves requests itself"),
    "ec_transfer_params": _no("the router places and moves requests itself"),
    "vllm_xargs": _no("it is for code in vLLM", {}),
    "mm_payload": _ignored("text only: there is none"),
    "return_mm_kwargs": _ignored("text only: there are none"),
    "media_io_kwargs": _no("text only", {}),
    "mm_processor_kwargs": _no("text only", {}),
}
_TEMPLATE = {
    "chat_template_kwargs": _yes("vLLM's; variables of the model's template, for example `enable_thinking`"),
    "include_reasoning": _ignored("the answer's text is given as the model writes it"),
}
_EFFORT = (
    "passed to a template that knows `reasoning_effort`, or as `enable_thinking`; if the template knows neither, only "
    "`none` is accepted"
)

_BEST_OF = _yes(
    "`n` to 128: so many answers are computed and counted, the `n` with the highest mean log-probability of a token "
    "are given, best first; more than `n` not with `stream: true`. With `use_beam_search`: how many beams there are"
)

CHAT: Fields = {
    "tools": _yes(
        "functions; their schemas are shown to the model, and enforced if `tool_choice` is `required` or names one. "
        "With `response_format`, an answer is either calls or text in that format; not allowed with "
        "`structured_outputs`, unless `tool_choice` is `none`"
    ),
    "tool_choice": _yes("`auto`, `none`, `required`, or a function by name; `allowed_tools` is refused"),
    "parallel_tool_calls": _yes("false: at most one call; what the model writes after it is dropped"),
    "messages": _yes(
        "text: content strings or parts of type `text`, which are joined; images, audio and files are refused. "
        "`developer` means `system`. Inside messages, null means absent, other fields are dropped (`annotations`, "
        "`parsed`, `reasoning_content`, `metadata`, ...), and arguments that are not a JSON object are passed as text"
    ),
    **_SAMPLING,
    **_STRUCTURED,
    "max_completion_tokens": _yes("default: what the context has room for"),
    "max_tokens": _yes("the older name of `max_completion_tokens`; both only if equal"),
    "logprobs": _yes("of the model's raw distribution; one entry for each token, including the end token"),
    "top_logprobs": _yes("0 to 20, with `logprobs`; see Log-probabilities below for how many fit in a response"),
    "reasoning_effort": _yes(_EFFORT),
    "verbosity": _ignored("it has no meaning for the models served here"),
    "modalities": _no("text only", ["text"]),
    "audio": _no("text only"),
    "prediction": _no("there is no speculative decoding from predictions"),
    "web_search_options": _no("there is no web search here"),
    "function_call": _no("the deprecated form; use `tool_choice`", "auto", "none"),
    "functions": _no("the deprecated form; use `tools`", []),
    **_BOOKKEEPING,
    **_EXTENSIONS,
    **_TEMPLATE,
    "add_special_tokens": _no("the template decides", False),
    "add_generation_prompt": _yes(
        "vLLM's; default true; false: the template does not open the assistant's next message"
    ),
    "continue_final_message": _yes(
        "vLLM's; true: the answer goes on with the last message; not with `add_generation_prompt: true`"
    ),
    "chat_template": _no("a template is a program; the model's own is used"),
    "documents": _no("put them into the messages", []),
    "echo": _no("the answer never repeats the prompt; use /v1/completions for that", False),
    "best_of": _BEST_OF,
}

COMPLETIONS: Fields = {
    "prompt": _yes("a string, a list of strings, token ids, or a list of lists of token ids; up to 128 prompts"),
    **_SAMPLING,
    **_STRUCTURED,
    "max_tokens": _yes("default 16, as OpenAI's; with `echo` or `prompt_logprobs` also 0: no token is sampled"),
    "logprobs": _yes(
        "0 to 20; of the model's raw distribution, one entry for each token, including the end token; see "
        "Log-probabilities below for how many fit in a response"
    ),
    "echo": _yes("with `logprobs`, the prompt's own stand before the answer's, as in OpenAI's; not in streams then"),
    "best_of": _BEST_OF,
    "suffix": _no("there is no infilling", ""),
    "user": _BOOKKEEPING["user"],
    "prompt_cache_key": _BOOKKEEPING["prompt_cache_key"],
    "metadata": _BOOKKEEPING["metadata"],
    **_EXTENSIONS,
    "add_special_tokens": _no("the tokenizer decides", True),
    "prompt_embeds": _no("prompts are text or token ids"),
}

RESPONSES: Fields = {
    "input": _yes(
        "a string, or items: messages with text, `function_call`, `function_call_output`, and `reasoning`, which is "
        "dropped; images, files and items of OpenAI's own tools are refused. Inside items, null means absent and "
        "other fields are dropped"
    ),
    "instructions": _yes("a system message before the input"),
    **{name: field for name, field in _SAMPLING.items() if name != "n"},
    "stream_options": _ignored("`include_obfuscation`: nothing is obfuscated"),
    "max_output_tokens": _yes("default: what the context has room for"),
    "text": _yes("`format`: text, json_object, json_schema (always enforced); `verbosity` is ignored"),
    "top_logprobs": _yes("0 to 20; see Log-probabilities below for how many fit in a response"),
    "include": _yes("`message.output_text.logprobs`; the others have no effect: no such output is produced here"),
    "tools": _yes(
        "functions, as for chat completions; OpenAI's other tools (`web_search`, `custom`, ...) are left out: the "
        "model is not told of them, and the response does not list them"
    ),
    "tool_choice": _yes("`auto`, `none`, `required`, or a function by name; `allowed_tools` is refused"),
    "parallel_tool_calls": _yes("false: at most one call; what the model writes after it is dropped"),
    "max_tool_calls": _ignored("it limits OpenAI's own tools, which do not exist here"),
    "reasoning": _yes(f"`effort`: {_EFFORT}; `summary` and `context` are ignored: there are no reasoning items"),
    "truncation": _ignored("`auto` acts as `disabled`: an input that does not fit is refused"),
    "client_metadata": _ignored("a label; nothing here depends on it"),
    "background": _no("an answer lives as long as its connection", False),
    "background_options": _no("an answer lives as long as its connection"),
    "previous_response_id": _no("nothing is stored; send the conversation as input"),
    "conversation": _no("nothing is stored; send the conversation as input"),
    "prompt": _no("prompts are not stored; send instructions and input"),
    "context_management": _no("a conversation that does not fit is refused; shorten it", []),
    "image": _no("text only"),
    "access_programs": _no("there are no such programs here"),
    **_BOOKKEEPING,
    "metadata": _yes("repeated in the response"),
    **_EXTENSIONS,
    "add_special_tokens": _no("the template decides", False),
    **_TEMPLATE,
    "return_token_ids": _no("token ids are not part of a response; chat completions have them", False),
    "prompt_logprobs": _no("they are not part of a response; chat completions have them"),
    "enable_response_messages": _no("messages are not part of the response", False),
    "previous_input_messages": _no("send the conversation as input", []),
    "structured_outputs": _STRUCTURED["structured_outputs"],
    "use_beam_search": _no("chat completions have beam search; leave it out or send false", False),
    "length_penalty": _no("it is for beam search, which chat completions have", 1, 1.0),
    "early_stopping": _no("it is for beam search, which chat completions have", False),
}

TOKENIZE: Fields = {
    "prompt": _yes("a string; either this or `messages`"),
    "messages": _yes("as in chat completions"),
    "tools": _yes("as in chat completions; with `messages`"),
    "model": _SAMPLING["model"],
    "add_special_tokens": _yes("default: true for a prompt; false for messages, whose template adds its own"),
    "add_generation_prompt": _yes("default true; with `messages`"),
    "chat_template_kwargs": _yes("variables of the model's template"),
    "return_token_strs": _yes("returns each token's text in `token_strs`"),
    "continue_final_message": _yes("true: the last message stays open; with `messages`"),
    "chat_template": _no("a template is a program; the model's own is used"),
    "media_io_kwargs": _no("text only", {}),
    "mm_processor_kwargs": _no("text only", {}),
}

DETOKENIZE: Fields = {
    "tokens": _yes("ids; special tokens are part of the text"),
    "model": _SAMPLING["model"],
}


def refuse_fields(body: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The body without the refused fields that ask for nothing. Raises ApiError for one that asks for something."""
    harmless = []
    for name, value in body.items():
        field = fields.get(name)
        if field is not None and field.treatment is Treatment.REFUSED:
            # By type as well: to Python, True equals 1.
            if value is not None and not any(type(value) is type(h) and value == h for h in field.harmless):
                raise invalid(name, f"{name} is not supported: {field.note}", "unsupported_parameter")
            harmless.append(name)
    return {k: v for k, v in body.items() if k not in harmless} if harmless else body


def written_into(document: str) -> str:
    """docs/api.md with the tables as they are here."""
    tables = {
        "chat": CHAT,
        "completions": COMPLETIONS,
        "responses": RESPONSES,
        "tokenize": TOKENIZE,
        "detokenize": DETOKENIZE,
    }
    for title, fields in tables.items():
        head, _, rest = document.partition(f"<!-- {title} -->\n")
        _, _, tail = rest.partition("<!-- end -->\n")
        lines = ["| field | | |", "|---|---|---|"]
        lines += [f"| `{name}` | {field.treatment} | {field.note} |" for name, field in fields.items()]
        table = "\n".join(lines)
        document = f"{head}<!-- {title} -->\n{table}\n<!-- end -->\n{tail}"
    return document


if __name__ == "__main__":
    api = Path(__file__).resolve().parents[3] / "docs" / "api.md"
    if sys.argv[1:] != ["--check"]:
        api.write_text(written_into(api.read_text()))
    elif written_into(api.read_text()) != api.read_text():
        sys.exit("stale: docs/api.md; run python -m router.doors.http.fields")
