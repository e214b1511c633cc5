"""Importing tempo_kernels needs torch alone and touches no device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys
import tempo_kernels.head, tempo_kernels.objectives, tempo_kernels.patchify, tempo_kernels.oracle
import torch
heavy = {"transformers", "peft", "deepspeed", "av", "numpy.testing", "tempo_fast", "triton"} & set(sys.modules)
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""


def test_import_is_light() -> None:
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r})\n"
    done = subprocess.run([sys.executable, "-c", path + CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
