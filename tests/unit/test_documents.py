"""What a document or a comment names is there: files, anchors, make targets, commands and their options, settings.

Read are the documents, the comments and docstrings of all Python files, and whole files of other kinds. Results and
lab notes tell what was: they may name what is gone, as long as it is not a link.
"""

from __future__ import annotations

import ast
import functools
import importlib
import io
import re
import shlex
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml
from pydantic import BaseModel

from deploy.chart_values import ChartValues, schema
from deploy.cli import app
from deploy.config import ClusterConfig
from settings.file import validate_settings

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = "py|md|ya?ml|json|jsonl|csv|toml|txt|proto|sh|cpp|cc|h|inc|html|css|js|png|svg|pml"
PATH = re.compile(
    rf"(?<![\w/.:{{}}$~@%*<>-])((?:\.{{1,2}}/)*(?:[\w-][\w.-]*/)+[\w.-]+\.(?:{ENDINGS})|[\w-]+\.(?:py|md|proto))\b(?![\w/*{{(]|\.\w)"
)
# Of a cluster that its user makes, or of a run.
MADE = re.compile(r"^(tls/|build/|report/|etc/|tmp/|\.venv/|var/|models/|traces/)")
PLACEHOLDER = re.compile(r"\b(OUT|DATE|CELL)\b")
FOREIGN = {  # files of other projects
    "proto/diptych/inference/open_inference.proto": {"specification/protocol/inference_grpc.md"},
    "tests/support/attention_libraries.py": {"flashinfer/decode.py", "prefill.py", "flash_attn_interface.py"},
}
HISTORY = {"docs/lab-notes.md"}


@functools.cache
def tracked() -> tuple[str, ...]:
    """As git has them; in a copy without git, all files that are there."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        names = done.stdout.split("\n")[:-1] if done.returncode == 0 else []
    except OSError:
        names = []
    names = names or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    hidden = re.compile(r"(^|/)(\.venv|\.vllm-env|\.clients|\.git|__pycache__|build)(/|$)")
    return tuple(name for name in names if not hidden.search(name) and (ROOT / name).is_file())


def documents() -> list[str]:
    return [name for name in tracked() if name.endswith(".md")]


def prose(name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that somebody reads as words: comments and docstrings of Python, everything of other files."""
    text = (ROOT / name).read_text()
    if not name.endswith(".py"):
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for offset, line in enumerate(node.value.value.splitlines()):
                yield node.lineno + offset, line


def read() -> list[str]:
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".proto", ".cpp", ".h")
    plain = ("Makefile", "Dockerfile", ".ci/run", ".gitignore")
    ours = [n for n in tracked() if n.endswith(kinds) or n.endswith(plain)]
    return [n for n in ours if not n.startswith(("benchmarks/results/", "tests/unit/test_documents.py"))]


@functools.cache
def base_names() -> frozenset[str]:
    return frozenset(Path(name).name for name in tracked())


def is_there(path: str, of: str) -> bool:
    """From the root, beside the file that names it, or (as people write) the end of a path that there is."""
    if any((base / path).exists() for base in (ROOT, (ROOT / of).parent)):
        return True
    if "/" not in path:
        return path in base_names()
    return any(name.endswith("/" + path) for name in tracked())


def missing(text: str, of: str) -> list[str]:
    found = [path for path in PATH.findall(text) if not MADE.match(path) and not PLACEHOLDER.search(path)]
    return [path for path in found if path not in FOREIGN.get(of, ()) and not is_there(path, of)]


def test_files_that_words_name_are_there() -> None:
    wrong = []
    for name in read():
        # Whole files first: few have a line of code or words to look at more closely.
        if name not in HISTORY and missing((ROOT / name).read_text(), name):
            wrong += [f"{name}:{line}: {path}" for line, text in prose(name) for path in missing(text, name)]
    assert wrong == []


def test_folders_that_documents_name_are_there() -> None:
    """A path between backticks that begins with a folder of ours, or ends with a slash."""
    folders = {str(parent) for name in tracked() for parent in Path(name).parents}
    wrong = []
    for name in documents():
        for path in (s for s in code(name) if re.fullmatch(r"(?:\.\./)*[\w-]+(?:/[\w-]+)*/?", s) and "/" in s):
            ours = path.endswith("/") or path.split("/")[0] in folders
            if ours and name not in HISTORY and not MADE.match(path) and not is_there(path, name):
                wrong.append(f"{name}: {path}")
    assert wrong == []


def slug(heading: str) -> str:
    """As GitHub makes anchors of headings."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        base = slug(heading)
        same = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", f) is not None for f in found)
        found.append(f"{base}-{same}" if same else base)
    return frozenset(found) | frozenset(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("name", documents())
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name} links to {target}, which has no such heading"


def code(name: str) -> Iterator[str]:
    """Lines of code blocks, and what is between backticks."""
    text = (ROOT / name).read_text()
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", rest))


def test_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = {
        (n, t) for n in documents() for line in code(n) for t in re.findall(r"(?:^|[;&|] *)make ([a-z][\w-]*)", line)
    }
    named |= {("Makefile", t) for t in re.findall(r'echo "make ([\w -]+?)  ', makefile) for t in t.split()}
    named |= {(".ci/run", t) for t in re.findall(r"^make ([\w-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)}
    for name in read():
        if name.endswith(".py") and "`make " in (ROOT / name).read_text():
            words = "\n".join(line for _, line in prose(name))
            named |= {(name, t) for t in re.findall(r"`make ([\w-]+)", words)}
    assert sorted((where, target) for where, target in named if target not in targets) == []
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets


@functools.cache
def whole_command() -> Any:
    return typer.main.get_command(app)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words lead to, and what is left of them."""
    found: Any = whole_command()
    while words and hasattr(found, "commands") and words[0] in found.commands:
        found, words = found.commands[words[0]], words[1:]
    return found, words


def diptych_calls(name: str) -> Iterator[list[str]]:
    if name.endswith(".md"):
        lines = list(code(name))
    else:  # what messages and comments tell people to type
        text = (ROOT / name).read_text()
        lines = re.findall(r"`(diptych [^`\n]+)`", text) + re.findall(r"^ *(?:#|//) +(diptych .*)", text, re.MULTILINE)
    for line in lines:
        for call in re.findall(r"(?:^|[;&|$] *|/)diptych ((?:[a-z-]).*)", line):
            try:
                yield shlex.split(re.split(r" # | \| | && |; ", call)[0], comments=True)
            except ValueError:
                yield call.split()


def test_commands_and_their_options_are_there() -> None:
    wrong = []
    for name in read():
        for words in diptych_calls(name):
            if not words or not re.fullmatch(r"[a-z][a-z-]+", words[0]):
                continue
            command, rest = command_of(words)
            call = f"{name}: diptych {' '.join(words)}"
            if hasattr(command, "commands") and not (rest and rest[0].startswith("--help")) and rest[:1]:
                wrong.append(call)
                continue
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
            wrong += [f"{call}: {o}" for w in rest if w.startswith("--") and (o := w.split("=")[0]) not in options]
    assert wrong == []


def setting(model: type[BaseModel], path: list[str]) -> bool:
    for number, name in enumerate(path):
        field = model.model_fields.get(name)
        if field is None:
            return False
        kinds = [k for k in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(k, type)]
        below = [k for k in kinds if issubclass(k, BaseModel)]
        if not below:
            return number == len(path) - 1 or field.annotation is dict or "dict" in str(field.annotation)
        model = below[0]
    return True


def module(path: list[str]) -> bool:
    """`router.policy`, `router.policy.decide`: a module or what is in one."""
    for length in range(len(path), 0, -1):
        base = ROOT.joinpath(*path[:length])
        if base.is_dir() or base.with_suffix(".py").exists():
            rest = path[length:]
            file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
            return not rest or (file.exists() and re.search(rf"\b{re.escape(rest[0])}\b", file.read_text()) is not None)
    return False


# Not settings: a name in a certificate, Ray's function, what a metric's label or a protocol's message is called.
OTHER_NAMES = re.compile(
    r"\.diptych\.internal|^ray\.(init|serve)|^worker\.proto|^(router|worker|engine|security)\.(py|yaml|log|crt|key)"
)


def dotted() -> re.Pattern[str]:
    packages = {n.split("/")[0] for n in tracked() if n.endswith("__init__.py") and n.count("/") == 1} | {"tests"}
    sections = set(ClusterConfig.model_fields) - {"model"}  # a name of its own
    first = "|".join(sorted(sections | packages))
    return re.compile(rf"(?<![\w./@-])((?:{first})(?:\.[a-z_]\w*)+)\b(?![/(-])")


def is_known(found: str) -> bool:
    path = found.split(".")
    known = setting(ClusterConfig, path) or setting(ChartValues, path)
    return bool(OTHER_NAMES.search(found)) or known or module(path)


def test_settings_and_modules_in_documents_are_there() -> None:
    pattern = dotted()
    wrong = {
        f"{name}: {found}"
        for name in documents()
        if name not in HISTORY
        for line in code(name)
        for found in pattern.findall(line)
        if not is_known(found)
    }
    assert sorted(wrong) == []


def test_settings_that_messages_name_are_there() -> None:
    """Strings and docstrings of the product: an error names its fix, and the fix must exist."""
    pattern, wrong = dotted(), set()
    for name in read():
        if not name.endswith(".py") or name.startswith(("tests/", "benchmarks/")):
            continue
        text = (ROOT / name).read_text()
        strange = {found for found in pattern.findall(text) if not is_known(found)}
        for node in ast.walk(ast.parse(text)) if strange else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wrong |= {f"{name}: {found}" for found in pattern.findall(node.value) if found in strange}
    assert sorted(wrong) == []


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(name, block) for name in documents() for block in pattern.findall((ROOT / name).read_text())]


def test_python_in_documents_is_python_and_names_what_we_have() -> None:
    assert blocks("python")
    for name, block in blocks("python"):
        tree = compile(block, name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diptych":
                found = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(found, alias.name), f"{name}: {node.module} has no {alias.name}"


def test_yaml_in_documents_is_a_configuration() -> None:
    assert blocks("yaml")
    for name, block in blocks("yaml"):
        if name == "docs/kubernetes.md":
            jsonschema.Draft7Validator(schema()).validate(_without_nulls(yaml.safe_load(block)))
        else:
            validate_settings(yaml.safe_load(block), ClusterConfig, name)


def _without_nulls(part: Any) -> Any:
    """As Helm hands values to the schema: null takes a key away."""
    if isinstance(part, dict):
        return {key: _without_nulls(below) for key, below in part.items() if below is not None}
    return part


SHELL = re.compile(r"(#|\$ |make |curl |kubectl |python |grpcurl |docker |chrt |(?:\.venv/bin/)?diptych )")


def test_commands_in_documents_are_shell() -> None:
    seen = 0
    for name, block in blocks(""):
        lines = [line for line in re.sub(r"\\\n", "", block).splitlines() if line.strip()]
        if all(SHELL.match(line.lstrip()) for line in lines):
            seen += 1
            script = "\n".join(line.removeprefix("$ ") for line in lines)
            done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stderr}"
    assert seen >= 3


def test_every_client_script_is_run_by_a_test() -> None:
    folder = ROOT / "tests/clients"
    tests = "\n".join(path.read_text() for path in folder.glob("*.py"))
    for script in (folder / "scripts").glob("*.py"):
        ast.parse(script.read_text())
        assert f'"{script.name}"' in tests, f"nobody runs {script.name}"


def test_a_request_is_read_in_twelve_hops() -> None:
    """The walk in docs/design.md: each hop names a class, method or function that its file has."""
    walk = (ROOT / "docs/design.md").read_text().split("### The same request, file by file")[1].split("\n## ")[0]
    hops = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \|", walk, re.M)
    assert [int(number) for number, _, _ in hops] == list(range(1, len(hops) + 1))
    assert 0 < len(hops) <= 12
    for _, file, name in hops:
        body = ast.parse((ROOT / file).read_text()).body
        for part in name.split("."):
            found = [n for n in body if getattr(n, "name", "") == part]
            assert found, f"docs/design.md: {file} has no {name}"
            body = found[0].body


def test_the_maps_name_every_package_and_every_room_of_the_router() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    layout = (ROOT / "README.md").read_text().split("## Repository layout")[1].split("\n## ")[0]
    assert packages <= {name.rstrip("/") for name in re.findall(r"`([\w/]+/)`", layout)}
    design = (ROOT / "docs/design.md").read_text().split("## Packages")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\|([^|]*)\|", design, re.M) for name in re.findall(r"`([^`]+)`", row)}
    assert packages - {"benchmarks"} <= named
    rooms = {f"router/{path.name}/" for path in (ROOT / "router").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= named
