"""A checkpoint's tokenizer, without importing torch where its files already say which class it is.

transformers' AutoTokenizer first imports the model's configuration class, and with that torch and its compilers: three
seconds and 300 MB of a process that computes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# For these AutoTokenizer always comes to the plain class, whatever else the files say: the test compares.
_PLAIN_CLASSES = {"TokenizersBackend", "PreTrainedTokenizerFast"}
_PLAIN_MODELS = {"llama"}


def load_tokenizer(path: str) -> Any:
    """transformers' tokenizer of a directory or a hub id. Raises OSError or ValueError for one that is not there."""
    if is_plain(Path(path)):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def is_plain(directory: Path) -> bool:
    """tokenizer.json is all of it, and no class of the model's own stands before it."""
    if not (directory / "tokenizer.json").exists():
        return False
    try:
        tokenizer, config = (json.loads((directory / n).read_text()) for n in ("tokenizer_config.json", "config.json"))
    except (OSError, ValueError):
        return False
    return (
        tokenizer.get("tokenizer_class") in _PLAIN_CLASSES
        and config.get("model_type") in _PLAIN_MODELS
        and "auto_map" not in tokenizer
    )
