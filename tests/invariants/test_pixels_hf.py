"""Pixels are those of transformers' own video processors of the Qwen families, sizes and sampled frames those of
Qwen2-VL's, as kept by hf_pixels.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tempo_fast.config import VideoConfig
from tempo_fast.models import get_family
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry
from tempo_fast.video.preprocess import fit, to_patches
from tempo_fast.video.reader import VideoReader
from tempo_fast.video.sampling import sample_frames, smart_resize

spec = importlib.util.spec_from_file_location("hf_pixels", Path(__file__).with_name("hf_pixels.py"))
assert spec is not None and spec.loader is not None
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

GEOMETRY = VideoGeometry(14, 2, 2, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def kept() -> dict[str, torch.Tensor]:
    return load_file(hf.KEPT)


@pytest.mark.parametrize("case", range(len(hf.VIDEOS)))
def test_pixels_equal_the_hugging_face_processor(kept: dict[str, torch.Tensor], tmp_path: Path, case: int) -> None:
    n, height, width, most = hf.VIDEOS[case]
    frames = hf.frames(n, height, width)
    path = tmp_path / "v.mkv"
    hf.write_lossless(path, frames)
    reader = VideoReader(VideoConfig(backend="pyav", max_pixels=most, min_pixels=56 * 56), GEOMETRY)
    plan = reader.plan(str(path), list(range(n)))
    assert torch.equal(reader.frames(plan), frames)
    assert [list(plan.grid)] == kept[f"grid{case}"].tolist()
    theirs = hf.pixel_values(kept, case)
    assert theirs.std() > 0.2
    assert (reader.pixels(plan) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("model, case", [(m, i) for m, videos in hf.SUCCESSORS.items() for i in range(len(videos))])
def test_pixels_of_its_successors(kept: dict[str, torch.Tensor], model: str, case: int) -> None:
    """Made of frames as large as the processor made them."""
    vision = SimpleNamespace(patch_size=16 if model == "qwen3_vl" else 14, spatial_merge_size=2, temporal_patch_size=2)
    geometry = get_family(model).geometry(SimpleNamespace(vision_config=vision))
    n, height, width, _ = hf.SUCCESSORS[model][case]
    grid = kept[f"{model}.grid{case}"][0].tolist()
    frames = fit(hf.frames(n, height, width), grid[1] * geometry.patch, grid[2] * geometry.patch, crop=False)
    assert list(geometry.grid(n, *frames.shape[1:3])) == grid
    theirs = hf.pixel_values(kept, case, model)
    assert theirs.std() > 0.1  # not a plain picture; Qwen3-VL divides by twice as much
    assert (to_patches(frames, geometry) - theirs).abs().max() < 1e-6


def test_sizes_equal_the_hugging_face_processor(kept: dict[str, torch.Tensor]) -> None:
    mine = [smart_resize(h, w, factor=28, min_pixels=least, max_pixels=most) for h, w, least, most in hf.sizes()]
    assert torch.equal(torch.tensor(mine), kept["sizes"].long())


def test_sampled_frames_equal_the_hugging_face_processor(kept: dict[str, torch.Tensor]) -> None:
    rows = kept["sampled"].long().split(kept["n_sampled"].tolist())
    for (n, rate, fps), theirs in zip(hf.samplings(), rows, strict=True):
        mine = sample_frames("hf_qwen2_vl", n, rate, fps=fps, min_frames=4, max_frames=768)
        whole, over = theirs.tolist()[: len(mine)], theirs.tolist()[len(mine) :]
        # theirs may run over the end by a frame
        assert mine == whole and all(i >= n for i in over), (n, rate, fps)
