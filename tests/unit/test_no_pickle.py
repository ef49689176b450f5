"""Nothing that came from a socket can run code: no pickle and its like in what we ship."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "settings", "grammar", "kv_transfer", "engine", "worker", "prefill_worker", "decode_worker", "elastic_worker",
    "router", "deploy",
    "proto/diptych",
)  # fmt: skip
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib"}
BANNED_CALLS = {
    "deserialize_descs", "serialize_descs",  # NIXL's: pickle
    "eval", "exec", "load_module", "unsafe_load", "full_load",
}  # fmt: skip


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute)
            if called(node) in BANNED_CALLS and not (method and called(node) in ("eval", "exec")):
                found.append(called(node))
            if called(node) == "load" and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                if owner == "torch" and not any(k.arg == "weights_only" for k in node.keywords):
                    found.append("torch.load without weights_only")
                if owner == "numpy" or owner == "np":
                    found.append("numpy.load")
    return found


def test_no_pickle_is_shipped() -> None:
    files = [path for package in SHIPPED for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 80
    for path in files:
        assert not offences(ast.parse(path.read_text())), path


def test_the_search_finds_what_it_is_for() -> None:
    for source in (
        "import pickle", "from pickle import loads", "agent.deserialize_descs(data)", "eval(x)",
        "torch.load(p)", "np.load(p)", "yaml.unsafe_load(t)", "import cloudpickle as c",
    ):  # fmt: skip
        assert offences(ast.parse(source)), source
    assert not offences(ast.parse("model.eval(); torch.load(p, weights_only=True); json.loads(t)"))
