"""Prompts, pixels and sampled frames of the frame families are those of transformers' own processors, as kept by
hf_frames.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tempo_fast.models import get_family
from tempo_fast.video.preprocess import fit, to_patches
from tempo_fast.video.sampling import sample_frames

sys.path.insert(0, str(Path(__file__).resolve().parent))

import hf_frames as hf  # noqa: E402


@pytest.fixture(scope="module")
def kept() -> dict[str, torch.Tensor]:
    return load_file(hf.KEPT)


@pytest.fixture(scope="module", params=hf.frame_models.NAMES)
def known(request: Any) -> tuple[str, Any, Any, Any]:
    """(name, family, tokenizer, config)"""
    name = request.param
    tokenizer = hf.frame_models.make_tokenizer(name)
    return name, get_family(name), tokenizer, hf.frame_models.make_config(name, tokenizer)


@pytest.mark.parametrize("case", range(len(hf.VIDEOS)))
def test_pixels(kept: dict[str, torch.Tensor], known: Any, case: int) -> None:
    name, family, _, config = known
    geometry = family.geometry(config)
    frames = hf.hf_pixels.frames(*hf.VIDEOS[case])
    mine = to_patches(fit(frames, geometry.side, geometry.side, crop=geometry.crop), geometry)
    theirs = hf.pixel_values(kept, name, case)
    assert theirs.std() > 0.2
    assert (mine.view_as(theirs) - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("case", range(len(hf.VIDEOS)))
def test_prompts(kept: dict[str, torch.Tensor], known: Any, case: int) -> None:
    name, family, tokenizer, config = known
    geometry = family.geometry(config)
    grid = geometry.grid(hf.VIDEOS[case][0], geometry.side, geometry.side)
    prompt = family.build_prompt(tokenizer, config, hf.QUESTION, [grid])
    assert prompt.input_ids.tolist() == kept[f"{name}.ids{case}"].tolist()
    assert int(prompt.visual.sum()) == geometry.tokens(grid)


def test_sampled_frames(kept: dict[str, torch.Tensor]) -> None:
    rows = kept["sampled"].long().split(kept["n_sampled"].tolist())
    for (n, k), theirs in zip(hf.COUNTS, rows, strict=True):
        mine = sample_frames("hf_internvl", n, 30.0, fps=1.0, min_frames=k, max_frames=k, temporal=1)
        # float32 steps: theirs may run over the last part by a frame
        assert mine == theirs.tolist()[:k] and len(mine) == k, (n, k)
