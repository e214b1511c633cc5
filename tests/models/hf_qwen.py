"""What transformers' processors of Qwen2-VL's successors make of a few prompts; kept beside this file.

They need torchvision: see tests/invariants/hf_pixels.py, and make them anew the same way:

    PYTHONPATH=FOLDER:.:kernels:tests python tests/models/hf_qwen.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = Path(__file__).with_suffix(".safetensors")
TEXT = "What happened before the blue square?"

_spec = importlib.util.spec_from_file_location("hf_pixels", Path(__file__).parents[1] / "invariants" / "hf_pixels.py")
assert _spec is not None and _spec.loader is not None
pixels = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pixels)


class Video(NamedTuple):
    """A file of ``total`` frames, ``rate`` a second, of which ``fps`` a second are shown, by ``rule``."""

    total: int
    rate: int
    height: int
    width: int
    fps: float
    rule: str

    def indices(self) -> list[int]:
        from tempo_fast.video.sampling import sample_frames

        return sample_frames(self.rule, self.total, self.rate, fps=self.fps, min_frames=2, max_frames=768)

    def frames(self) -> Tensor:
        """uint8 [total, height, width, 3]"""
        return pixels.frames(self.total, self.height, self.width)


# a rate that no second divides; two videos, one longer than wide (in positions), one of an odd number of frames
CASES = [
    [Video(25, 10, 40, 70, 1.7, "qwen_vl_utils")],
    [Video(60, 20, 40, 100, 4.0, "qwen_vl_utils"), Video(30, 10, 70, 40, 1.0, "hf_qwen3_vl")],
]
FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
LEAST, MOST = 32 * 32, 64 * 64 * 64  # pixels of a whole video, as Qwen3-VL's processor counts


def table_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """At most 256 float32 values, and uint8 codes into them."""
    table, codes = torch.unique(values, return_inverse=True)
    assert len(table) <= 256
    return table, codes.to(torch.uint8)


def make_processor(name: str, tokenizer: Any) -> Any:
    import transformers

    kinds: dict[str, Any] = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }
    if name == "qwen3_vl":
        video = transformers.Qwen3VLVideoProcessor(size={"shortest_edge": LEAST, "longest_edge": MOST})
    else:
        video = transformers.Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 8})
    images = transformers.Qwen2VLImageProcessor()
    return kinds[name](images, tokenizer, video, chat_template=tokenizer.chat_template)


def by_processor(
    name: str, case: list[Video], tokenizer: Any, messages: list[dict[str, Any]] | None = None
) -> dict[str, Tensor]:
    """``messages`` None: ``TEXT`` about the videos of the case."""
    from transformers.video_utils import VideoMetadata

    processor = make_processor(name, tokenizer)
    content = [{"type": "video"} for _ in case] + [{"type": "text", "text": TEXT}]
    messages = messages or [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    told = [VideoMetadata(v.total, fps=v.rate, frames_indices=v.indices()) for v in case]
    made = processor(
        text=[text],
        videos=[v.frames()[v.indices()].permute(0, 3, 1, 2) for v in case],
        video_metadata=told,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )
    out = {"ids": made["input_ids"][0], "grids": made["video_grid_thw"]}
    if name == "qwen3_vl":
        out["table"], out["codes"] = table_of(made["pixel_values_videos"])
    elif name == "qwen2_5_vl":
        out["seconds"] = torch.as_tensor(made["second_per_grid_ts"], dtype=torch.float64)
    return out


if __name__ == "__main__":
    pixels._declare_operators()
    import tiny_qwen
    import transformers
    from safetensors.torch import save_file

    found = {
        f"{name}.{i}.{key}": value.contiguous()
        for name in FAMILIES
        for i, case in enumerate(CASES)
        for key, value in by_processor(name, case, tiny_qwen.make_tokenizer()).items()
    }
    save_file(found, KEPT, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")
