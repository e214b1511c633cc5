"""Importing the packages must not pull in, or touch, anything heavy."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = [
    "transformers",
    "peft",
    "deepspeed",
    "nvidia.dali",
    "av",
    "scenedetect",
    "cv2",
    "tensorboard",
    "vllm",
    "triton",
]


def loaded_after(code: str) -> dict:
    """Run ``code`` in a fresh interpreter outside the repository; what it left in ``sys.modules``."""
    probe = (
        f"{code}\nimport sys, json\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "print(json.dumps({'heavy': heavy, 'torch': torch is not None,"
        " 'cuda': bool(torch and torch.cuda.is_initialized())}))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd="/")
    return json.loads(out.stdout.splitlines()[-1])


def test_tempo_fast_is_light():
    assert loaded_after("import tempo_fast") == {"heavy": [], "torch": False, "cuda": False}


def test_kernels_need_torch_alone():
    found = loaded_after("import tempo_kernels, tempo_kernels.head, tempo_kernels.objectives")
    assert found == {"heavy": [], "torch": True, "cuda": False}


@pytest.mark.parametrize("module", ["tempo_fast.config", "tempo_fast.schema", "tempo_fast.configio", "tempo_fast.cli"])
def test_config_and_commands_are_light(module):
    found = loaded_after(f"import {module}")
    assert not found["heavy"] and not found["torch"]


def test_every_folder_of_code_is_a_package():
    """A folder without ``__init__.py`` works in a checkout and is missing from a wheel."""
    code = [p.parent for base in ("tempo_fast", "kernels/tempo_kernels") for p in (ROOT / base).rglob("*.py")]
    assert code and all((folder / "__init__.py").is_file() for folder in code)


def test_root_shadows_no_library():
    """``kernels`` must stay importable as the Hugging Face library of that name."""
    assert "kernels" not in {m.name for m in pkgutil.iter_modules([str(ROOT)])}
