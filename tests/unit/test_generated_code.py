"""The committed protobuf code is what `make proto` makes of the .proto files."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    """Regenerating into an empty folder gives the committed files, byte for byte."""
    try:
        metadata.version("grpcio-tools")
        metadata.version("mypy-protobuf")
    except metadata.PackageNotFoundError:
        pytest.skip("grpcio-tools and mypy-protobuf are missing: pip install -e '.[dev]'")
    import subprocess
    import sys

    sources = sorted((ROOT / "proto/rhizome/v1").glob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpc_python_out")]
    outputs += [f"--{kind}=quiet:{tmp_path}" for kind in ("mypy_out", "mypy_grpc_out")]
    plugins = Path(sys.executable).parent
    names = [str(source.relative_to(ROOT / "proto")) for source in sources]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *names]
    subprocess.run(command, check=True, cwd=ROOT, env={"PATH": str(plugins)})
    made = {path.name: path.read_text() for path in (tmp_path / "rhizome/v1").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "proto/rhizome/v1").glob("*_pb2*")}
    assert made == committed, "run `make proto`"
