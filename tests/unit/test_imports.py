"""Imports run one way (docs/design.md, "Packages"). Walks the source; runs nothing."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

ALLOWED = {
    "settings": set(),
    "checkpoint": {"settings"},
    "grammar": set(),
    "kv_transfer": {"settings"},
    "engine": {"checkpoint", "grammar", "kv_transfer", "settings"},
    "worker": {"engine", "grammar", "kv_transfer", "settings"},
    "prefill_worker": {"worker", "engine", "grammar", "kv_transfer", "settings"},
    "decode_worker": {"worker", "engine", "grammar", "kv_transfer", "settings"},
    "elastic_worker": {"prefill_worker", "decode_worker", "worker", "engine", "grammar", "kv_transfer", "settings"},
    "router": {"checkpoint", "grammar", "kv_transfer", "settings"},
    "scaling": set(),
    "simulator": {"checkpoint", "router", "scaling", "engine", "worker", "kv_transfer", "settings"},
    "deploy": {
        "router",
        "elastic_worker",
        "worker",
        "engine",
        "checkpoint",
        "kv_transfer",
        "scaling",
        "settings",
        "simulator",
    },
}
# Of the engine and the router the simulator runs what decides, never what computes or speaks to a network.
SIMULATED = {
    "worker": {"worker.rates"},
    "engine": {
        "engine.block_pool", "engine.chunk_budget", "engine.core", "engine.load", "engine.overload",
        "engine.scheduler", "engine.sequence", "engine.step_cost", "engine.types",
    },
    "router": {
        "router.admission", "router.placement.cluster", "router.config", "router.dispatcher", "router.errors",
        "router.lifecycle", "router.live", "router.placement.lots", "router.placement.policy",
        "router.placement.prefix_index", "router.record.tracing", "router.request",
    },
}  # fmt: skip
ENTRIES = {"prefill_worker/__main__.py", "decode_worker/__main__.py"}  # of elastic_worker, by the role to begin with
STUB_FILES = {"buffers.py", "service.py", "clients.py", "wire.py", "admin.py"}
TORCH_FILES = {
    "engine/overlap.py",
    "engine/verify.py",
    "engine/runner.py",
    "engine/sampler.py",
    "engine/scoring.py",
    "engine/model_check.py",
    "engine/model_loader.py",
    "engine/model_probe.py",
    "engine/adapters/format.py",
    "engine/adapters/layers.py",
    "engine/draft_model.py",
    "engine/pool_sizes.py",
    "engine/prediction_head.py",
    "engine/quantization.py",
    "engine/stored_numbers.py",
    "engine/unpack.py",
    "engine/recurrent.py",
    "engine/recurrent_step.py",
    "engine/mixer_cache.py",
    "engine/merged_linear.py",
    "engine/latent.py",
    "engine/longrope.py",
    "engine/kv_rounding.py",
    "engine/kv_shape.py",
    "engine/invariance_trial.py",
    "engine/invariant_linear.py",
    "engine/attention/interface.py",
    "engine/attention/gather.py",
    "engine/attention/grouped.py",
    "engine/attention/choose.py",
    "engine/attention/triton_paged.py",
    "engine/attention/pages.py",
    "engine/attention/flashinfer_paged.py",
    "engine/attention/flash_attn_paged.py",
    "engine/attention/invariant.py",
    "engine/attention/native.py",
    "engine/experts/choose.py",
    "engine/experts/grouped.py",
    "engine/experts/load.py",
    "engine/experts/parts.py",
    "engine/native/experts.py",
    "engine/native/layers.py",
    "engine/native/mlp.py",
    "engine/native/recurrent.py",
    "engine/forward.py",
    "engine/graphs.py",
    "engine/fused/choose.py",
    "engine/fused/kernels.py",
    "engine/fused/model.py",
    "engine/native/choose.py",
    "engine/position_trial.py",
    "engine/ranks/cuts.py",
    "engine/ranks/follower.py",
    "engine/ranks/group.py",
    "engine/ranks/joined.py",
    "engine/ranks/leader.py",
    "engine/ranks/weights.py",
    "engine/layer_taps.py",
    "engine/made_up.py",
    "engine/native/library.py",
    "engine/native/quantized.py",
    "engine/native/stack.py",
    "engine/native/step.py",
    "deploy/convert.py",
    "deploy/model_store.py",
}
LLGUIDANCE_FILES = {"grammar/structured.py", "engine/grammar.py", "router/text/tokenizer.py"}
KERNELS = "engine.attention.triton_paged"
TRITON_FILES = {"engine/attention/triton_kernels.py", "engine/fused/kernels.py"}
MOST_LINES = 600
GRPC_EXTRAS = {"worker/server.py", "router/server.py"}  # assemble servers, so they name services


def files() -> Iterator[tuple[str, Path]]:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield "elastic_worker" if str(path.relative_to(ROOT)) in ENTRIES else package, path


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of these modules each imports: at its top, inside functions, for the type checker."""
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [module if module in sources else node.module or "" for module in inside]
            else:
                continue
            graph[name].update(module for module in named if module in sources and module != name)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """For each set of modules that reach each other, a shortest way round: open it, look again."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set[str](), [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[start] = seen
    found: list[list[str]] = []
    done: set[str] = set()
    for start in sorted(graph):
        if start in reached[start] and start not in done:
            done |= {other for other in reached[start] if start in reached[other]}
            ways = [[start]]
            while ways[0][-1] != start or len(ways[0]) == 1:  # breadth first
                way = ways.pop(0)
                ways += [[*way, after] for after in sorted(graph[way[-1]]) if start in reached[after]]
            found.append(ways[0])
    return found


@functools.cache
def imports_of(path: Path) -> list[str]:
    return list(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    for owner, path in files():
        if owner != package:
            continue
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in ALLOWED and top != package:
                assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"


def test_no_module_imports_itself_by_a_detour() -> None:
    """Not inside functions and not for types either: what needs each other is one idea, or names a third."""
    graph = graph_of({module_of(path): path.read_text() for _, path in files()})
    assert not (found := circles(graph)), "\n".join(" -> ".join(way) for way in found)


def test_a_circle_is_found_wherever_it_hides() -> None:
    sources = {
        "a": "import b",
        "b": "if TYPE_CHECKING:\n    from p import c",
        "p": "",
        "p.c": "def f():\n    from a import x",
        "q": "from q.d import y",
        "q.d": "from p import other",
        "e": "import f",
        "f": "from e import z\nfrom a import x",
    }
    assert circles(graph_of(sources)) == [["a", "b", "p.c", "a"], ["e", "f", "e"]]


def test_no_file_is_longer_than_a_reader_holds() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for _, path in files()}
    too_long = {where: lines for where, lines in lengths.items() if lines > MOST_LINES}
    assert not too_long, f"over {MOST_LINES} lines, look for the second idea inside: {too_long}"


def test_the_simulator_runs_what_decides_only() -> None:
    for package, path in files():
        if package == "simulator":
            for name in imports_of(path):
                top = name.split(".")[0]
                assert top not in SIMULATED or name in SIMULATED[top], f"{path.name} imports {name}"


def test_heavy_and_foreign_imports_stay_in_their_files() -> None:
    for package, path in files():
        where = str(path.relative_to(ROOT))
        for name in imports_of(path):
            top = name.split(".")[0]
            if top == "torch":
                assert where in TORCH_FILES, f"{where} imports torch"
            if top == "triton":
                assert where in TRITON_FILES, f"{where} imports triton"
            if top == "ray":
                assert package == "deploy", f"{where} imports ray"
            if top == "llguidance":
                assert where in LLGUIDANCE_FILES, f"{where} imports llguidance"
            if top.startswith("nixl"):
                assert where == "kv_transfer/nixl_agent.py", f"{where} imports nixl"
            if name.startswith("diptych."):
                assert path.name in STUB_FILES or where in GRPC_EXTRAS, f"{where} imports stubs"


def test_triton_is_imported_only_when_chosen() -> None:
    """It may be absent: one function imports the kernels, and no file does at its top."""
    importers = {str(path.relative_to(ROOT)) for _, path in files() if KERNELS in imports_of(path)}
    assert importers == {"engine/attention/choose.py"}
    top_level = ast.parse((ROOT / "engine/attention/choose.py").read_text()).body
    named = {node.module for node in top_level if isinstance(node, ast.ImportFrom)}
    assert "engine.attention.gather" in named
    assert KERNELS not in named
    at_top = ast.parse((ROOT / "engine/fused/choose.py").read_text()).body
    assert not [node for node in at_top if isinstance(node, ast.ImportFrom) and node.module == "engine.fused"]


def test_deciding_code_has_no_clock_no_sockets_no_threads() -> None:
    deciding = [
        "engine/block_pool.py", "engine/core.py", "engine/scheduler.py", "engine/sequence.py",
        "engine/chunk_budget.py", "engine/step_cost.py", "engine/beams.py", "engine/beam_search.py", "engine/load.py",
        "kv_transfer/lease.py", "kv_transfer/source.py", "kv_transfer/reader.py",
        "worker/core.py", "worker/compiling.py", "worker/watchdog.py",
        "prefill_worker/core.py", "decode_worker/core.py", "elastic_worker/core.py",
        "router/lifecycle.py", "router/legs.py", "router/moves.py", "router/request.py", "router/planner.py",
        *(f"scaling/{name}.py" for name in ("demand", "observation", "policy", "state", "weighing")),
        *(f"router/placement/{name}.py" for name in (
            "policy", "route", "estimates", "rule", "refusals", "view", "cluster", "prefix_index", "correction",
            "newcomers", "moves", "lots",
        )),
    ]  # fmt: skip
    forbidden = {"time", "socket", "threading", "asyncio", "grpc", "os"}
    for where in deciding:
        for name in imports_of(ROOT / where):
            assert name.split(".")[0] not in forbidden, f"{where} imports {name}"


def test_proto_is_not_a_package() -> None:
    """The PyPI package proto-plus owns that import name."""
    assert not (ROOT / "proto" / "__init__.py").exists()
