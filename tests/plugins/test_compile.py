"""torch.compile around the model: the same keys, and a notice where no compiler works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forge_plugins.mathematics.optimizers.torch_compile import compiler_fault


def smoke(folder: Path, **environment: str) -> list[dict[str, object]]:
    """A run of the pipeline `smoke` with the wrapper; the notices of it that its log has."""
    command = [
        sys.executable, "-m", "forge_kernel", "run", "smoke", "--quiet", "--output-dir", str(folder),
        "--set", "wrappers=[{use: compile, with: {dynamic: true}}]", "--set", "run.max_steps=3",
        "--set", "observers=[{use: metrics_jsonl}]", "--set", "quantizer=null",
        "--set", "exporters=[{use: state_dict}]",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "not_compiled"]


@pytest.mark.spec("K10")
def test_without_a_compiler_the_run_says_so_and_goes_on(tmp_path: Path) -> None:
    """Planted fault: the compiler's error is let through."""
    told = smoke(
        tmp_path / "run", CXX="/nonexistent/c++", PATH="/nonexistent",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "nothing compiled before"),
    )  # fmt: skip
    assert len(told) == 1
    assert "not compiled" in str(told[0]["message"])


@pytest.mark.spec("K10")
def test_compiled_the_weights_have_the_same_names(tmp_path: Path) -> None:
    assert compiler_fault("cpu") is None, "this machine has no compiler: nothing can be tested"
    assert smoke(tmp_path / "compiled") == []
    weights = load_file(next((tmp_path / "compiled" / "exports").rglob("*.safetensors")))
    assert weights
    assert not any("_orig_mod" in name for name in weights)
