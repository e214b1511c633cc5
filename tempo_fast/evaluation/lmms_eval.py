"""The lmms-eval command line for a merged model, with the frame rate and pixel limits it was trained with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError

TASKS = ("videomme", "tempcompass", "mvbench", "vinoground", "tvbench")

# transformers' model_type -> (lmms-eval's --model, whether its wrapper takes fps); lmms_eval/models/{simple,chat}
_MODELS = {"qwen2_vl": ("qwen2_vl", False), "qwen2_5_vl": ("qwen2_5_vl", True), "qwen3_vl": ("qwen3_vl", True)}


def lmms_eval_command(
    merged: str | Path,
    video: VideoConfig,
    *,
    model_type: str = "qwen2_vl",
    tasks: Sequence[str] = TASKS,
    processes: int = 1,
    output: str = "lmms_eval_results",
) -> str:
    """A shell command, to be run where lmms-eval is installed. Adapters have to be merged first.

    lmms-eval's limits are per frame; a video's ``total_pixels`` over ``max_frames`` frames is the tighter bound for
    long ones, so the smaller of it and ``max_pixels`` is passed. Its wrapper of Qwen2-VL takes no fps (qwen-vl-utils'
    own rate applies, cut to ``max_num_frames``); a comment line says so.

    Args:
        merged: directory that ``from_pretrained`` loads.
        video: the training's limits.
        model_type: as in the directory's config.json.
        processes: GPUs.

    Raises:
        InputError: lmms-eval has no wrapper for the architecture.
    """
    if model_type not in _MODELS:
        raise InputError(f"model.path: no lmms-eval model is known for '{model_type}'; known: {', '.join(_MODELS)}")
    name, takes_fps = _MODELS[model_type]
    per_frame = max(video.min_pixels, min(video.max_pixels, 2 * video.total_pixels // max(2, video.max_frames)))
    arguments: dict[str, object] = {
        "pretrained": merged,
        "min_pixels": video.min_pixels,
        "max_pixels": per_frame,
        "max_num_frames": video.max_frames,
    }
    if takes_fps:
        arguments["fps"] = f"{video.fps:g}"
    command = [
        *("accelerate", "launch", f"--num_processes={processes}", "-m", "lmms_eval"),
        *("--model", name, "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
        *("--tasks", ",".join(tasks), "--batch_size", "1", "--log_samples", "--output_path", output),
    ]
    text = shlex.join(command)
    note = f"# lmms-eval's {name} takes no fps: set qwen-vl-utils' own rate to {video.fps:g}\n"
    return text if takes_fps else note + text
