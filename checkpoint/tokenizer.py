"""A checkpoint's tokenizer: encoding is a function of the text, and the one that transformers computes.

1. Its files are read with suspicion first, so that what is cut short is named.
2. Where the files say that tokenizer.json is all of it, it is read here, by the package tokenizers: a tenth of a second
   and 30 MB. Else transformers has a class that adds something, and that takes torch, seconds and 300 MB: where it is
   not in the process already, another process does it (by_transformers.py).
3. State that a file keeps is settled (loaded_tokenizer.py).
4. The chat template is parsed, and rendered without transformers (chat_template.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from checkpoint.chat_template import ChatTemplate
from checkpoint.files import CheckpointError, check_directory, read_object, read_optional
from checkpoint.loaded_tokenizer import LoadedTokenizer, cannot_load, settle

# With these AutoTokenizer always comes to its plain class, whatever else the files say: the test compares.
PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
PLAIN_MODELS = (
    *("llama", "apertus", "bamba", "deepseek_v3", "exaone4", "falcon_h1", "glm4", "glm4_moe", "gpt_neox", "gpt_oss"),
    *("granite", "hunyuan_v1_dense", "lfm2", "lfm2_moe", "llama4", "llama4_text", "olmo2", "olmo3", "qwen3"),
    *("qwen3_moe", "seed_oss", "smollm3"),
)
_TOKENS = (*("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),)
# Of tokenizer_config.json: what the plain class does not look at, or only when it decodes, pads or truncates, which
# nothing here asks of it. add_bos_token and add_eos_token mean nothing to it beside a tokenizer.json.
_WITHOUT_MEANING = {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "backend", "clean_up_tokenization_spaces", "is_local"),
    *("legacy", "local_files_only", "model_input_names", "model_max_length", "name_or_path", "padding_side"),
    *("processor_class", "tokenizer_class", "truncation_side", "use_default_system_prompt"),
}
_READ_HERE = {
    *(*_TOKENS, "added_tokens_decoder", "additional_special_tokens", "chat_template", "extra_special_tokens"),
    "split_special_tokens",
}
_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json")


def load_tokenizer(path: str) -> LoadedTokenizer:
    """Raises CheckpointError."""
    directory = Path(path)
    content = _checked_files(directory)
    if is_plain(directory, content):
        loaded = _read_plain(directory)
    else:
        from checkpoint import by_transformers

        here = "torch" in sys.modules and "transformers" in sys.modules
        loaded = by_transformers.load_here(directory) if here else by_transformers.load_apart(directory)
    try:
        loaded.template.check()
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return loaded


def is_plain(directory: Path, tokenizer: Mapping[str, Any]) -> bool:
    """tokenizer.json and the names of special tokens are all of it: no class, and nothing that is added to it.
    `tokenizer`: what tokenizer.json holds.
    """
    stated, config = (read_optional(directory / name) for name in ("tokenizer_config.json", "config.json"))
    return (
        "model" in tokenizer
        and stated.get("tokenizer_class") in PLAIN_CLASSES
        and config.get("model_type") in PLAIN_MODELS
        and set(stated) <= _WITHOUT_MEANING | _READ_HERE
        and isinstance(stated.get("split_special_tokens", False), bool)
        and isinstance(stated.get("chat_template") or "", str)
        and not tokenizer.get("padding")
        and not (directory / "additional_chat_templates").exists()
        and _tokens_are_there(stated, tokenizer, directory)
    )


def _tokens_are_there(stated: Mapping[str, Any], tokenizer: Mapping[str, Any], directory: Path) -> bool:
    """No token would be added that tokenizer.json does not have, and none in another way."""
    added = {t["id"]: t for t in tokenizer.get("added_tokens", []) if isinstance(t, dict) and "id" in t}
    special = {t.get("content") for t in added.values() if t.get("special")}
    extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or []
    if not isinstance(extra, list):  # by name, for the template
        return False
    named = [stated[name] for name in _TOKENS if stated.get(name) is not None]
    if any(_content(token) not in special for token in (*named, *extra)):
        return False
    listed = stated.get("added_tokens_decoder")
    if listed is None:  # then these files have a say
        return not any((directory / name).exists() for name in ("special_tokens_map.json", "added_tokens.json"))
    if not isinstance(listed, dict):
        return False
    return all(i.isdecimal() and added.get(int(i)) == {"id": int(i), **_fields(token)} for i, token in listed.items())


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _fields(token: Any) -> dict[str, Any]:
    return {k: v for k, v in token.items() if k != "__type"} if isinstance(token, dict) else {}


def _read_plain(directory: Path) -> LoadedTokenizer:
    """Raises CheckpointError."""
    template = directory / "chat_template.jinja"
    try:
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        text = template.read_text(encoding="utf-8") if template.exists() else None
    except BaseException as panic:  # Rust's panics are of no public type
        raise cannot_load(directory, panic) from panic
    stated = read_object(directory / "tokenizer_config.json")
    if backend.post_processor is None:  # as transformers does it
        nothing = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        backend.post_processor = nothing  # type: ignore[assignment]
    settle(backend, directory, split_special_tokens=stated.get("split_special_tokens", False))
    tokens = {name: _content(stated[name]) for name in _TOKENS if stated.get(name) is not None}
    end = tokens.get("eos_token")
    text = stated.get("chat_template") if text is None else text
    return LoadedTokenizer(backend, None if end is None else backend.token_to_id(end), ChatTemplate(text, tokens))


def _checked_files(directory: Path) -> dict[str, Any]:
    """What tokenizer.json holds; empty where there is none. Raises CheckpointError."""
    check_directory(directory)
    for name in _JSON:
        read_optional(directory / name)
    try:
        entries = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read ({error.strerror}); change its permissions") from None
    if "tokenizer.json" in entries:
        content = read_object(directory / "tokenizer.json")
        if not isinstance(content.get("model"), dict):
            raise CheckpointError(
                f"{directory / 'tokenizer.json'} has no model, so it is no tokenizer; download or copy it again"
            )
        return content
    if not entries & {"tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt"}:
        raise CheckpointError(f"{directory} has no tokenizer.json; copy the tokenizer's files beside the weights")
    return {}
