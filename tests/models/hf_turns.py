"""What transformers' processors of all families make of a chat of several turns about videos; kept beside this file.

They need torchvision: see tests/invariants/hf_pixels.py, and make them anew the same way:

    PYTHONPATH=FOLDER:.:kernels:tests python tests/models/hf_turns.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

KEPT = Path(__file__).with_suffix(".safetensors")
TURNS = [("What happens?", "A red circle moves left."), ("Then?", "Then a blue square grows.\nIt appears at last.")]
TEXT = "What happened before the blue square?"
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FRAMES = ["internvl", "llava_onevision", "llava_next_video"]
COUNTS = [3, 3]  # frames of each video, for the families that see whole ones (processors take equal numbers alone)


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hf_qwen = load("hf_qwen", Path(__file__).with_name("hf_qwen.py"))
CASE = hf_qwen.CASES[1]  # two videos


def messages(n_videos: int) -> list[dict[str, Any]]:
    """The chat as the processors' documentation writes it: the videos in the first turn."""
    said = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in TURNS
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    said[0]["content"] = [{"type": "video"}] * n_videos + said[0]["content"]
    return [*said, {"role": "user", "content": [{"type": "text", "text": TEXT}]}]


def by_processor() -> dict[str, Tensor]:
    import frame_models
    import tiny_qwen

    from tempo_fast.models import get_family

    hf_frames = load("hf_frames", Path(__file__).parents[1] / "invariants" / "hf_frames.py")
    out: dict[str, Tensor] = {}
    for name in QWEN:
        made = hf_qwen.by_processor(name, CASE, tiny_qwen.make_tokenizer(), messages(len(CASE)))
        out |= {f"{name}.ids": made["ids"], f"{name}.grids": made["grids"]}
    for name in FRAMES:
        tokenizer = frame_models.make_tokenizer(name)
        geometry = get_family(name).geometry(frame_models.make_config(name, tokenizer))
        processor = hf_frames.make_processor(name, tokenizer, geometry)
        text = processor.apply_chat_template(messages(len(COUNTS)), add_generation_prompt=True)
        videos = [hf_qwen.pixels.frames(n, 30, 40).permute(0, 3, 1, 2) for n in COUNTS]
        made = processor(text=text, videos=videos, do_sample_frames=False, return_tensors="pt")
        out[f"{name}.ids"] = made["input_ids"][0]
    return out


if __name__ == "__main__":
    hf_qwen.pixels._declare_operators()
    import torch
    import transformers
    from safetensors.torch import save_file

    found = {name: values.to(torch.int16) for name, values in by_processor().items()}
    save_file(found, KEPT, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")
