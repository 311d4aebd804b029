"""What stands in for packages that a GPU machine without a network lacks."""

import subprocess
import sys
from pathlib import Path

from tests.gpu import carry


def test_flashinfer_can_be_imported_and_not_called(tmp_path: Path) -> None:
    """SGLang imports its names everywhere, and uses norm, activation and rope as soon as they can be imported."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer/__init__.py").write_text(carry.FLASHINFER)
    program = """
from flashinfer.cute_dsl.blockscaled_gemm import grouped_gemm_nt_masked
from flashinfer import top_k
import flashinfer.sampling
for name in ("norm", "activation", "rope"):
    try:
        __import__(f"flashinfer.{name}")
    except ImportError:
        continue
    raise SystemExit(name)
for absent in (top_k, grouped_gemm_nt_masked, flashinfer.sampling.top_p):
    try:
        absent(1)
    except NotImplementedError:
        continue
    raise SystemExit(absent)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_pins_that_travel_are_those_of_the_locks() -> None:
    pins = dict(pin.split("==") for pin in carry.pins())
    assert {"sglang", "transformers", "httptools", "cffi", "sglang-kernel", "torch-memory-saver"} <= set(pins)
    assert not set(pins) & set(carry.THERE.split())
