"""What transformers' own processors of the frame families make of a chat about a video; kept beside this file.

Made anew as hf_pixels.py says (the processors need torchvision):

    PYTHONPATH=FOLDER:.:kernels:tests python tests/invariants/hf_frames.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import frame_models  # noqa: E402
import hf_pixels  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

KEPT = Path(__file__).with_suffix(".safetensors")
# (frames, height, width): wide, tall with an odd number of frames, smaller than the square
VIDEOS = [(2, 50, 73), (3, 90, 41), (1, 20, 25)]
QUESTION = "What happens?"
# (frames of the file, frames wanted)
COUNTS = [(n, k) for n in (1, 7, 30, 31, 299, 1000) for k in (1, 2, 5, 8, 16, 32) if k <= n]


def pixel_values(kept: dict[str, Tensor], name: str, i: int) -> Tensor:
    """The processor's float32 [F, 3, S, S] of video ``i``."""
    return torch.stack([kept[f"{name}.table{i}.{c}"][kept[f"{name}.codes{i}.{c}"].long()] for c in range(3)], dim=1)


def make_processor(name: str, tokenizer: Any, geometry: Any) -> Any:
    import transformers

    side = {"height": geometry.side, "width": geometry.side}
    own = {"image_mean": geometry.mean, "image_std": geometry.std}
    if name == "internvl":
        return transformers.InternVLProcessor(
            image_processor=transformers.GotOcr2ImageProcessor(), tokenizer=tokenizer, image_seq_length=4,
            video_processor=transformers.InternVLVideoProcessor(size=side, **own),
            chat_template=tokenizer.chat_template,
        )  # fmt: skip
    if name == "llava_onevision":
        return transformers.LlavaOnevisionProcessor(
            image_processor=transformers.LlavaOnevisionImageProcessor(), tokenizer=tokenizer,
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=side, **own),
            num_image_tokens=25, vision_feature_select_strategy="full", chat_template=tokenizer.chat_template,
        )  # fmt: skip
    shortest = {"shortest_edge": geometry.side}
    return transformers.LlavaNextVideoProcessor(
        image_processor=transformers.LlavaNextImageProcessor(), tokenizer=tokenizer,
        video_processor=transformers.LlavaNextVideoVideoProcessor(size=shortest, crop_size=side, **own),
        patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip


def by_processor() -> dict[str, Tensor]:
    """Token ids and pixel values (see ``pixel_values``) per family and video, frames sampled by InternVL's rule."""
    hf_pixels._declare_operators()
    from transformers.video_utils import VideoMetadata

    from tempo_fast.models import get_family

    out: dict[str, Tensor] = {}
    for name in frame_models.NAMES:
        tokenizer = frame_models.make_tokenizer(name)
        config = frame_models.make_config(name, tokenizer)
        geometry = get_family(name).geometry(config)
        processor = make_processor(name, tokenizer, geometry)
        if name == "internvl":
            rows = [
                processor.video_processor.sample_frames(VideoMetadata(total_num_frames=n, fps=30.0), num_frames=k)
                for n, k in COUNTS
            ]
            out["sampled"] = torch.cat(rows).to(torch.int16)
            out["n_sampled"] = torch.tensor([len(r) for r in rows], dtype=torch.int16)
        for i, (n, height, width) in enumerate(VIDEOS):
            video = hf_pixels.frames(n, height, width).permute(0, 3, 1, 2)
            content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            made = processor(text=text, videos=[video], do_sample_frames=False, return_tensors="pt")
            out[f"{name}.ids{i}"] = made["input_ids"][0].to(torch.int16)
            pixels = made["pixel_values" if name == "internvl" else "pixel_values_videos"]
            pixels = pixels.reshape(n, 3, geometry.side, geometry.side)
            for c in range(3):
                table, codes = torch.unique(pixels[:, c], return_inverse=True)
                assert len(table) <= 256
                out |= {f"{name}.table{i}.{c}": table, f"{name}.codes{i}.{c}": codes.to(torch.uint8)}
            assert torch.equal(pixel_values(out, name, i), pixels)
    return out


if __name__ == "__main__":
    import transformers
    from safetensors.torch import save_file

    save_file(by_processor(), KEPT, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")
