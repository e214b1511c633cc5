"""What transformers' own video processors of Qwen2-VL and its successors make of a few videos, and the first also of
sizes and frame rates; kept beside this file.

The processor needs torchvision, and an installed torchvision whose compiled part does not load beside a CPU build of
torch breaks every import of transformers' models. So its results are kept, and made anew with torchvision in a folder
of its own; declaring its operators is enough, the processor calls none of them:

    pip install --no-deps --target FOLDER torchvision==0.28.0
    PYTHONPATH=FOLDER:. python tests/invariants/hf_pixels.py
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEPT = Path(__file__).with_suffix(".safetensors")
FPS = 3.0
# (frames, height, width, most pixels of a frame): enlarged, shrunk, an odd number of frames
VIDEOS = [(4, 50, 70, 28 * 28 * 6), (5, 110, 150, 28 * 28 * 4), (1, 63, 41, 28 * 28 * 4)]
# the same for the processors that transformers names for Qwen2-VL's successors; Qwen3-VL's counts the pixels of all
# frames. An odd number of frames, shrunk, in each; enlarged in Qwen3-VL's too
SUCCESSORS = {
    "qwen2_5_vl": [(3, 110, 150, 28 * 28 * 4)],
    "qwen3_vl": [(2, 40, 56, 2 * 64 * 96), (3, 110, 150, 11200)],
}
SIZES = [(1, 3136, 602112), (2, 4 * 28 * 28, 28 * 28 * 9)]


def frames(n: int, height: int, width: int) -> Tensor:
    """uint8 [n, height, width, 3] without a generator, the same in every version: an integer hash of each index."""
    x = torch.arange(n * height * width * 3, dtype=torch.int64)
    x = (x * 2654435761 + 12345) % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    return (x >> 24).to(torch.uint8).view(n, height, width, 3)


def write_lossless(path: Path, frames: Tensor, rate: int = 12) -> None:
    """A file of exactly these uint8 [F, H, W, 3] frames, ``rate`` a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def sizes() -> list[tuple[int, int, int, int]]:
    """(height, width, least pixels, most pixels)."""
    rng, out = random.Random(0), []
    while len(out) < 1500:
        h, w = rng.randrange(28, 2000), rng.randrange(28, 2000)
        if max(h, w) <= 200 * min(h, w):
            out.append((h, w, *SIZES[len(out) % 2][1:]))
    return out


def samplings() -> list[tuple[int, float, float]]:
    """(frames of the file, its rate, frames per second wanted)."""
    rng = random.Random(1)
    return [
        (int(10 ** rng.uniform(0.7, 3.0)), rng.choice([12, 23.976, 25, 29.97, 30]), rng.choice([0.5, 1, 2, 4]))
        for _ in range(100)
    ]


def pixel_values(kept: dict[str, Tensor], i: int, model: str = "") -> Tensor:
    """The processor's float32 [P, C*t*p*p] of video ``i``: per channel at most 256 values, and codes into them."""
    name = f"{model}." if model else ""
    channels = [kept[f"{name}table{i}.{c}"][kept[f"{name}codes{i}.{c}"].long()] for c in range(3)]
    return torch.stack(channels, dim=1).flatten(1)


def by_processor() -> dict[str, Tensor]:
    """Pixel values (see ``pixel_values``), grids, sizes, sampled frames."""
    _declare_operators()
    from transformers.models.auto.video_processing_auto import (
        VIDEO_PROCESSOR_MAPPING_NAMES,
        video_processor_class_from_name,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor, smart_resize
    from transformers.video_utils import VideoMetadata

    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
    out: dict[str, Tensor] = {}
    for i, (n, h, w, most) in enumerate(VIDEOS):
        out |= _processed(processor, i, frames(n, h, w), {"shortest_edge": 56 * 56, "longest_edge": most})
    for model, videos in SUCCESSORS.items():
        named = video_processor_class_from_name(VIDEO_PROCESSOR_MAPPING_NAMES[model]["torchvision"])
        for i, (n, h, w, pixels) in enumerate(videos):
            edges = {"shortest_edge": pixels if model == "qwen3_vl" else 56 * 56, "longest_edge": pixels}
            out |= _processed(named(cap_pixels_per_frame=False), i, frames(n, h, w), edges, model)
    resized = [smart_resize(h, w, 28, least, most) for h, w, least, most in sizes()]
    out["sizes"] = torch.tensor(resized, dtype=torch.int16)
    sampled = []
    for n, rate, fps in samplings():
        metadata = VideoMetadata(total_num_frames=n, fps=rate)
        found = processor.sample_frames(metadata, fps=fps, min_frames=4, max_frames=768, temporal_patch_size=2)
        sampled.append(found.to(torch.int16) if isinstance(found, Tensor) else torch.tensor(found.tolist()).short())
    out["sampled"] = torch.cat(sampled)
    out["n_sampled"] = torch.tensor([len(s) for s in sampled], dtype=torch.int16)
    return out


def _processed(processor: Any, i: int, video: Tensor, edges: dict[str, int], model: str = "") -> dict[str, Tensor]:
    """``grid``, ``table`` and ``codes`` of one video, names as ``pixel_values`` reads them."""
    made = processor(
        videos=[video.permute(0, 3, 1, 2)], size=edges, return_tensors="pt", do_sample_frames=False,
        cap_pixels_per_frame=False,
    )  # fmt: skip
    name = f"{model}." if model else ""
    out = {f"{name}grid{i}": made["video_grid_thw"]}
    for c, values in enumerate(made["pixel_values_videos"].unflatten(1, (3, -1)).unbind(1)):
        table, codes = torch.unique(values, return_inverse=True)
        assert len(table) <= 256
        out |= {f"{name}table{i}.{c}": table, f"{name}codes{i}.{c}": codes.to(torch.uint8)}
    assert torch.equal(pixel_values(out, i, model), made["pixel_values_videos"])
    return out


def _declare_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
            library.define(f"{op}(Tensor a) -> Tensor")
            if op not in ("nms", "qnms"):
                library.define(f"_{op}_backward(Tensor a) -> Tensor")
        globals()["_kept_library"] = library
        import torchvision  # noqa: F401


if __name__ == "__main__":
    import transformers
    from safetensors.torch import save_file

    save_file(by_processor(), KEPT, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")
