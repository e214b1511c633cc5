"""Pixels, sizes and sampled frames are those of transformers' own Qwen2-VL video processor.

That processor needs torchvision, whose compiled part does not load beside a CPU build of torch; it is not used, so that
declaring its operators is enough. In a process of its own, because that cannot be undone.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="needs torchvision (pip install --no-deps torchvision==0.28.0)",
)

SCRIPT = """
import random, sys
import torch
try:
    import torchvision
except RuntimeError:
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        library.define(f"{op}(Tensor a) -> Tensor")
        if op not in ("nms", "qnms"):
            library.define(f"_{op}_backward(Tensor a) -> Tensor")
    import torchvision
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor, smart_resize as theirs
from transformers.video_utils import VideoMetadata
from tempo_fast.config import VideoConfig
from tempo_fast.models.family import VideoGeometry
from tempo_fast.models.qwen2_vl import CLIP_MEAN, CLIP_STD
from tempo_fast.video.reader import VideoReader
from tempo_fast.video.sampling import sample_frames, smart_resize, video_max_pixels

torch.set_num_threads(1)
geometry = VideoGeometry(14, 2, 2, CLIP_MEAN, CLIP_STD, "qwen_vl_utils")
processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)
for config in (VideoConfig(backend="pyav", fps=3), VideoConfig(backend="pyav", fps=3, max_pixels=28 * 28 * 6)):
    reader = VideoReader(config, geometry)
    whole = reader.plan(sys.argv[1])
    for plan in (whole, reader.plan(sys.argv[1], whole.indices[:5])):
        most = video_max_pixels(config, len(plan.indices), geometry)
        size = {"shortest_edge": config.min_pixels, "longest_edge": most}
        out = processor(videos=[reader.frames(plan).permute(0, 3, 1, 2)], size=size, return_tensors="pt",
                        do_sample_frames=False, cap_pixels_per_frame=False)
        assert out["video_grid_thw"].tolist() == [list(plan.grid)]
        worst = (out["pixel_values_videos"] - reader.pixels(plan)).abs().max().item()
        assert worst < 1e-6, worst
rng = random.Random(0)
for _ in range(3000):
    h, w = rng.randrange(20, 2000), rng.randrange(20, 2000)
    if max(h, w) <= 200 * min(h, w):
        mine = smart_resize(h, w, factor=28, min_pixels=3136, max_pixels=602112)
        assert mine == theirs(h, w, 28, 3136, 602112), (h, w)
for _ in range(1000):
    n, rate, fps = rng.randrange(4, 4000), rng.choice([12, 23.976, 25, 29.97, 30]), rng.choice([0.5, 1, 2, 4])
    metadata = VideoMetadata(total_num_frames=n, fps=rate)
    wanted = processor.sample_frames(metadata, fps=fps, min_frames=4, max_frames=768, temporal_patch_size=2).tolist()
    mine = sample_frames("hf_qwen2_vl", n, rate, fps=fps, min_frames=4, max_frames=768)
    assert mine == wanted[:len(mine)] and all(i >= n for i in wanted[len(mine):]), (n, rate, fps)
print("equal")
"""


def test_pixels_equal_the_hugging_face_processor(tmp_path: Path) -> None:
    import av

    path = tmp_path / "v.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 150, 110, "yuv420p"
        for _ in range(30):
            small = rng.integers(0, 256, (11, 15, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.kron(small, np.ones((10, 10, 1), np.uint8)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.strip().endswith("equal"), done.stderr[-2000:]
