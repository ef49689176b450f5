"""The committed stubs are what the .proto files generate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_stubs_are_current(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "proto/diptych").glob("*/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *protos], cwd=ROOT, check=True)
    generated = sorted(tmp_path.rglob("*_pb2*"))
    assert len(generated) == 3 * len(protos)
    for path in generated:
        committed = ROOT / "proto" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed} is stale; run `make proto`"
