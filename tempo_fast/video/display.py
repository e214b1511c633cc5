"""How stored pixels become displayed pixels: a container's display matrix as an axis swap and flips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tempo_fast.video.container import DecodeError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DisplayTransform:
    """Swap the axes, then flip columns, then rows. ``told`` is the rotation that FFmpeg tells with each frame."""

    swap: bool = False
    flip_x: bool = False
    flip_y: bool = False
    told: int = 0

    @property
    def clockwise(self) -> int:
        """The rotation part in degrees clockwise (mirrored pictures: of the nearest rotation)."""
        if self.swap:
            return 90 if self.flip_x else 270 if self.flip_y else 90
        return 180 if self.flip_x and self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        """Not a pure rotation."""
        return self.swap ^ self.flip_x ^ self.flip_y

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as displayed of a stored picture, or the other way round."""
        return (width, height) if self.swap else (height, width)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] as stored -> as displayed, a view."""
        if self.swap:
            image = image.transpose(1, 0, 2)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return image

    def apply_to_frames(self, frames: Tensor) -> Tensor:
        """uint8 [F, H, W, 3] as stored -> as displayed, contiguous, on the device it lies on."""
        if self.swap:
            frames = frames.transpose(1, 2)
        flipped = [axis for axis, flip in ((2, self.flip_x), (1, self.flip_y)) if flip]
        return (frames.flip(flipped) if flipped else frames).contiguous()


def display_transform(path: str, frame: Any) -> DisplayTransform:
    """The frame's display matrix (a b u, c d v, x y w: x' = a x + c y, y' = b x + d y) as axis swap and flips.

    Not for every frame of a file: a frame whose side data was looked at stays in memory until Python collects cycles.

    Raises:
        DecodeError: the matrix turns the picture by something else than quarter turns.
    """
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return DisplayTransform()
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if b == c == 0 and a and d:
        return DisplayTransform(False, a < 0, d < 0, frame.rotation)
    if a == d == 0 and b and c:
        return DisplayTransform(True, c < 0, b < 0, frame.rotation)
    raise DecodeError(
        f"{path}: its display matrix turns the picture by {frame.rotation} degrees; only quarter turns work"
    )
