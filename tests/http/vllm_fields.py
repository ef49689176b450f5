"""vLLM's own request fields, by which docs/api.md is held: python -m tests.http.vllm_fields WHEEL

WHEEL is vLLM's wheel (`pip download --no-deps vllm==VERSION`). Nothing of it runs: its protocol files are read as
syntax trees, and the names of fields, with those defaults that are plain values, are written to vllm_fields.json.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("vllm_fields.json")
CLASSES = {
    "chat": ("openai/chat_completion/protocol.py", ["ChatCompletionRequest"]),
    "completions": ("openai/completion/protocol.py", ["CompletionRequest"]),
    "responses": ("openai/responses/protocol.py", ["ResponsesRequest"]),
    "tokenize": ("serve/tokenize/protocol.py", ["TokenizeCompletionRequest", "TokenizeChatRequest"]),
    "detokenize": ("serve/tokenize/protocol.py", ["DetokenizeRequest"]),
}


def fields_of(source: str, names: list[str]) -> dict[str, list[Any]]:
    """By name the defaults: none if a field has none that is a plain value, several if the classes differ."""
    fields: dict[str, list[Any]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or node.name not in names:
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            name = field.target.id
            if name.startswith("_") or "ClassVar" in ast.unparse(field.annotation):
                continue
            defaults = fields.setdefault(name, [])
            defaults += [value for value in _default(field.value) if value not in defaults]
    return dict(sorted(fields.items()))


def _default(value: ast.expr | None) -> list[Any]:
    if isinstance(value, ast.Call):  # Field(default, default=default, ...)
        named = {k.arg: k.value for k in value.keywords}
        value = value.args[0] if value.args else named.get("default")
    try:
        return [] if value is None else [ast.literal_eval(value)]
    except ValueError:
        return []


def main(wheel: str) -> None:
    found = re.match(r"vllm-([^-]+)-", Path(wheel).name)
    assert found is not None, f"{wheel} is not vLLM's wheel"
    with zipfile.ZipFile(wheel) as archive:
        tables = {
            title: fields_of(archive.read(f"vllm/entrypoints/{path}").decode(), names)
            for title, (path, names) in CLASSES.items()
        }
    lines = [f'"version": {json.dumps(found[1])}']
    for title, fields in tables.items():
        each = [f"  {json.dumps(name)}: {json.dumps(defaults)}" for name, defaults in fields.items()]
        lines.append(f"{json.dumps(title)}: {{\n" + ",\n".join(each) + "\n}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
