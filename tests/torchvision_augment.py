"""What torchvision's own functions make of a few frames; kept beside this file.

An installed torchvision whose compiled part does not load beside a CPU build of torch breaks imports of others, so its
results are kept, and made anew with torchvision in a folder of its own; declaring its operators is enough, these
functions call none of them:

    pip install --no-deps --target FOLDER torchvision==0.28.0
    PYTHONPATH=FOLDER python tests/torchvision_augment.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

KEPT = Path(__file__).with_suffix(".safetensors")
HEIGHT, WIDTH = 23, 31
COLOURS = {
    "brightness": [0.6, 1.37], "contrast": [0.61, 1.4], "saturation": [0.8, 1.19], "hue": [-0.1, 0.043, 0.5],
}  # fmt: skip
SIGMAS = [0.1, 0.7, 1.33, 2.0]
CROP = (3, 5, 14, 17, 28, 56)  # top, left, height, width; resized to


def frames() -> Tensor:
    """uint8 [2, 23, 31, 3]: noise, then soft colours. The same in every version: whole numbers alone."""
    x = torch.arange(HEIGHT * WIDTH * 3, dtype=torch.int64)
    x = (x * 2654435761 + 12345) % 2**32
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    noise = (x >> 24).to(torch.uint8).view(HEIGHT, WIDTH, 3)
    y, z = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    soft = torch.stack([y * 11, 255 - z * 8, (y * z) % 97 + 40], -1).clamp(0, 255).to(torch.uint8)
    return torch.stack([noise, soft])


def name(what: str, amount: float) -> str:
    return f"{what} {amount:g}"


def by_torchvision() -> dict[str, Tensor]:
    """uint8 [2, H, W, 3] by ``name``."""
    _declare_operators()
    import torchvision.transforms.v2.functional as tv

    x = frames().permute(0, 3, 1, 2).contiguous()
    out = {name(what, a): getattr(tv, f"adjust_{what}")(x, a) for what, amounts in COLOURS.items() for a in amounts}
    for sigma in SIGMAS:
        size = 2 * math.ceil(3 * sigma) + 1
        out[name("blur", sigma)] = tv.gaussian_blur(x, [size, size], [sigma, sigma])
    out["grey"] = tv.rgb_to_grayscale(x, num_output_channels=3)
    out["flip"] = tv.horizontal_flip(x)
    bicubic = tv.InterpolationMode.BICUBIC
    out["crop"] = tv.resized_crop(x, *CROP[:4], size=list(CROP[4:]), interpolation=bicubic, antialias=True)
    return {key: value.permute(0, 2, 3, 1).contiguous() for key, value in out.items()}


def _declare_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
            library.define(f"{op}(Tensor a) -> Tensor")
            if op not in ("nms", "qnms"):
                library.define(f"_{op}_backward(Tensor a) -> Tensor")
        globals()["_kept_library"] = library
        import torchvision  # noqa: F401


if __name__ == "__main__":
    from importlib.metadata import version

    from safetensors.torch import save_file

    save_file(by_torchvision(), KEPT, {"torchvision": version("torchvision"), "torch": torch.__version__})
    print(f"{KEPT}: {KEPT.stat().st_size} bytes")
