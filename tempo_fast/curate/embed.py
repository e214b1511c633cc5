"""Image embeddings of shots: rows of unit length, so that a dot product is a cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tempo_fast.config import CurateConfig
from tempo_fast.curate.device import network_device
from tempo_fast.errors import InputError


class Embedder(Protocol):
    def embed(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3] RGB frames (any sizes) -> float32 [n, E], rows of length 1."""
        ...


@lru_cache(maxsize=2)
def _make(embedder: str, path: str) -> Embedder:
    return HistogramEmbedder() if embedder == "histogram" else SiglipEmbedder(path)


def check_embedder(config: CurateConfig) -> None:
    """Raises InputError when there is no checkpoint where there should be one; loads nothing."""
    if config.embedder == "siglip" and not (Path(config.embedder_path) / "config.json").is_file():
        raise InputError(
            f"curate.embedder_path: {config.embedder_path!r} is not a checkpoint directory (no config.json)"
        )


def make_embedder(config: CurateConfig) -> Embedder:
    """The embedder of a config, loaded once per process. Raises InputError when its weights are missing."""
    check_embedder(config)
    return _make(config.embedder, config.embedder_path)


class HistogramEmbedder:
    """A joint hue x saturation x value histogram, plus a row of greys for pixels that have no hue.

    Bins are soft (a pixel shares itself among its neighbours), so that noise at a bin's edge changes little; hue is
    circular. A pixel is grey as far as its chroma (saturation x value) stays below 0.12, where hue is mostly noise.
    """

    HUES, SATURATIONS, VALUES, GREYS = 18, 3, 4, 8
    _EDGE = 128
    _CHROMA = 0.12

    def embed(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([self._one(f) for f in frames])

    def _one(self, frame: np.ndarray) -> np.ndarray:
        import cv2

        longest = max(frame.shape[:2])
        if longest > self._EDGE:
            f = self._EDGE / longest
            size = (max(1, round(frame.shape[1] * f)), max(1, round(frame.shape[0] * f)))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        picture = np.ascontiguousarray(frame, dtype=np.uint8).astype(np.float32) / 255
        h, s, v = (c.reshape(-1) for c in cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)))
        colour = np.clip(s * v / self._CHROMA, 0, 1)
        bins = np.zeros(self.HUES * self.SATURATIONS * self.VALUES)
        for hue, hue_share in _soft(h / 360 * self.HUES, self.HUES, circular=True):
            for sat, sat_share in _soft(s * self.SATURATIONS - 0.5, self.SATURATIONS):
                for val, val_share in _soft(v * self.VALUES - 0.5, self.VALUES):
                    index = (hue * self.SATURATIONS + sat) * self.VALUES + val
                    bins += np.bincount(index, colour * hue_share * sat_share * val_share, len(bins))
        greys = np.zeros(self.GREYS)
        for val, share in _soft(v * self.GREYS - 0.5, self.GREYS):
            greys += np.bincount(val, (1 - colour) * share, self.GREYS)
        row = np.concatenate([bins, greys])
        return (row / np.linalg.norm(row)).astype(np.float32)


def _soft(x: np.ndarray, n: int, circular: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    """Coordinates in bins -> the two neighbouring bins and the share of each."""
    low = np.floor(x)
    high_share = x - low
    low = low.astype(np.int64)
    if circular:
        return [(low % n, 1 - high_share), ((low + 1) % n, high_share)]
    return [(low.clip(0, n - 1), 1 - high_share), ((low + 1).clip(0, n - 1), high_share)]


class SiglipEmbedder:
    """The pooled image features of a local SigLIP checkpoint, through transformers (lscpku/TEMPLE:
    ``tools/similarity.py``; float16 on CUDA as there, float32 on a CPU).

    The picture is resized (bicubic, antialias) to the model's square and normalised to -1..1, or as the checkpoint's
    ``preprocessor_config.json`` says.
    """

    def __init__(self, path: str, batch: int = 32) -> None:
        import torch
        from transformers import AutoModel

        from tempo_fast.files import read_json

        self._device = network_device()
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        try:
            model: Any = AutoModel.from_pretrained(path, local_files_only=True, dtype=self._dtype)
        except (OSError, ValueError) as e:
            raise InputError(f"curate.embedder_path: {path} cannot be loaded ({str(e).splitlines()[0]})") from e
        vision = getattr(model, "vision_model", None)
        if vision is None:
            raise InputError(f"curate.embedder_path: {path} is a {model.config.model_type} without a vision model")
        self._vision = vision.to(self._device).eval()  # the rest, its text tower, goes
        self._side = int(vision.config.image_size)
        extra = Path(path) / "preprocessor_config.json"
        stated = read_json(extra) if extra.is_file() else {}
        self._mean = torch.tensor(stated.get("image_mean", [0.5] * 3), device=self._device)
        self._std = torch.tensor(stated.get("image_std", [0.5] * 3), device=self._device)
        self._batch = batch

    def embed(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        import torch

        from tempo_fast.video.preprocess import resize

        rows = []
        with torch.inference_mode():
            for at in range(0, len(frames), self._batch):
                small = [
                    resize(torch.from_numpy(np.ascontiguousarray(f))[None], self._side, self._side)
                    for f in frames[at : at + self._batch]
                ]
                x = (torch.cat(small).to(self._device).float() / 255 - self._mean) / self._std
                pooled = self._vision(pixel_values=x.permute(0, 3, 1, 2).to(self._dtype)).pooler_output.float()
                rows.append(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())
        return np.concatenate(rows)
