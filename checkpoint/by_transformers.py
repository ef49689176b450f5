"""A tokenizer whose class only transformers knows: in a process that ends, so that no router keeps torch for it.

    router    `python -m checkpoint.by_transformers DIRECTORY`
    child     AutoTokenizer, which imports torch: three seconds and 300 MB; the backend's state is settled, a trial
              compares the backend with the class
    router    reads what the child found: the backend as the library itself writes it, the chat template, the names of
              special tokens. Or the refusal

A process that has torch already does the same within itself.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoint.chat_template import ChatTemplate
from checkpoint.files import CheckpointError
from checkpoint.loaded_tokenizer import TRIAL, LoadedTokenizer, cannot_load, settle

log = logging.getLogger(__name__)

_LOAD_S = 240.0


def load_here(directory: Path) -> LoadedTokenizer:
    """Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        wrapped: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except BaseException as panic:  # Rust's panics are of no public type
        raise cannot_load(directory, panic) from panic
    backend = getattr(wrapped, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{directory} has no tokenizer.json, and transformers makes none of what is there; convert the tokenizer "
            "with transformers (PreTrainedTokenizerFast), and save it"
        )
    settle(backend, directory, split_special_tokens=bool(getattr(wrapped, "split_special_tokens", False)))
    for text in TRIAL:
        for special in (True, False):
            ours = backend.encode(text, add_special_tokens=special).ids
            if ours != wrapped(text, add_special_tokens=special)["input_ids"]:
                raise CheckpointError(
                    f"{directory / 'tokenizer.json'} encodes {text[:20]!r} in another way than transformers does; save "
                    "the tokenizer again with transformers"
                )
    template = ChatTemplate(wrapped.chat_template, wrapped.special_tokens_map)
    return LoadedTokenizer(backend, wrapped.eos_token_id, template)


def load_apart(directory: Path) -> LoadedTokenizer:
    """Raises CheckpointError."""
    log.info("the tokenizer in %s needs transformers: it is loaded in a process of its own", directory)
    paths = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "checkpoint.by_transformers", str(directory)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            timeout=_LOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"loading the tokenizer in {directory} took more than {_LOAD_S:g} s; give this machine more processor time"
        ) from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise CheckpointError(
            f"the process that loads the tokenizer in {directory} ended with {done.returncode}; its last lines are "
            "above: mend what they name, or give it more memory"
        ) from None
    if "refused" in found:
        raise CheckpointError(found["refused"])
    if not found["copies"]:
        log.warning("the tokenizer in %s cannot be copied between processes: this one keeps transformers", directory)
        return load_here(directory)
    backend = Tokenizer.from_str(found["backend"])
    settle(backend, directory, split_special_tokens=found["split_special_tokens"])
    return LoadedTokenizer(
        backend, found["eos_token_id"], ChatTemplate(found["chat_template"], found["special_tokens"])
    )


def copies(backend: Tokenizer) -> bool:
    """What the library writes of it and reads again is the same tokenizer."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = backend.encode_special_tokens
    return (
        copy.to_str() == backend.to_str()
        and repr(copy.get_added_tokens_decoder()) == repr(backend.get_added_tokens_decoder())
        and all(
            copy.encode(text, add_special_tokens=special).ids == backend.encode(text, add_special_tokens=special).ids
            for text in TRIAL
            for special in (True, False)
        )
    )


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    try:
        loaded = load_here(Path(sys.argv[1]))
        found: dict[str, Any] = {
            "backend": loaded.backend.to_str(),
            "copies": copies(loaded.backend),
            "split_special_tokens": loaded.backend.encode_special_tokens,
            "eos_token_id": loaded.eos_token_id,
            "chat_template": loaded.template.stated,
            "special_tokens": loaded.template.special_tokens,
        }
    except CheckpointError as error:
        found = {"refused": str(error)}
    with out:
        json.dump(found, out)


if __name__ == "__main__":
    main()
