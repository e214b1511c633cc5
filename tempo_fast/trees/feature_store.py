"""Visual features of frozen towers on disk, so that later stages, epochs and runs neither decode nor encode.

On disk::

    <tower>[-bfloat16]/<plan key>.safetensors    one per video: ``features`` [G, E]

``<tower>`` begins the digest of the tower's weights and settings, ``plan key`` is that of everything that decides the
pixels: another tower, other frames or another size is another file. The whole digests and a checksum stand in the
header. A file is written aside, synced and renamed, so that several processes may share a folder; it is verified each
time it is read, and a damaged one is deleted. What only changes rounding (device, versions, attention of the tower) is
not in the names.

Shapes: G visual tokens of one video, E channels (deeper features included).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, digest, drop_stale, write_atomic
from tempo_fast.models.family import Family, unwrap
from tempo_fast.models.load import BOOKKEEPING

log = logging.getLogger("tempo_fast")

FORMAT = "1"


def tower_digest(family: Family, model: nn.Module) -> str:
    """SHA-256 (hex) over the vision tower's weights (names, dtypes, bytes) and the settings of all but the text model:
    what decides features beside the pixels. Reads every weight: about a second per gigabyte."""
    config = unwrap(model).config.to_dict()
    h = hashlib.sha256(canonical_json([family.name, _settings(config, "text_config")]).encode())
    for name, weight in sorted(family.vision_tower(model).state_dict().items()):
        h.update(_described(name, weight).encode())
        h.update(_bytes(weight))
    return h.hexdigest()


class FeatureStore:
    """Features in one folder, least recently used first out.

    Args:
        root: folder, made here. Several processes may use it at once.
        max_bytes: of all files together; after a write the least recently used go. A larger entry is not kept.
        dtype: ``same`` keeps features as they are. ``bfloat16`` halves float32 ones, and rounds them: ``rounded`` says
            what then is to be used in place of fresh features, so that a result does not depend on what was cached.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(
        self, root: str | os.PathLike[str], max_bytes: int, dtype: Literal["same", "bfloat16"] = "same"
    ) -> None:
        self.root = Path(root)
        self.max_bytes = max_bytes
        self.dtype = dtype
        self._broken = False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"features.disk: {self.root} cannot be made ({e.strerror})") from e
        for folder in self.root.iterdir():
            drop_stale(folder)

    def rounded(self, features: Tensor) -> Tensor:
        """``features`` as they come back from disk, in their own dtype."""
        return features if self.dtype == "same" else features.to(torch.bfloat16).to(features.dtype)

    def holds(self, plan_key: str, tower: str = "") -> bool:
        """Whether features of these pixels are here, of this tower or of any (they were decoded once)."""
        if tower:
            return self._path(tower, plan_key).is_file()
        return next(self.root.glob(f"*/{plan_key}.safetensors"), None) is not None

    def get(self, tower: str, plan_key: str) -> Tensor | None:
        """Features [G, E] on the CPU in the dtype they had when they were put; None when missing or damaged."""
        from safetensors.torch import load

        path = self._path(tower, plan_key)
        try:
            data = path.read_bytes()
            header_end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:header_end])["__metadata__"]
            features = load(data)["features"]
            if header != self._header(tower, plan_key, features, header["dtype"]):
                raise ValueError("checksum")
            dtype = getattr(torch, header["dtype"])
        except FileNotFoundError:
            return None
        except Exception as e:  # safetensors raises its own kind, and whatever the bytes happen to break
            log.warning("%s: damaged features dropped, computed again (%s)", path, type(e).__name__)
            _remove(path)
            return None
        _touch(path)
        return features.to(dtype)

    def put(self, tower: str, plan_key: str, features: Tensor) -> None:
        """Keep features [G, E]. A full disk is a warning, once, and nothing more is written: the features are at hand
        all the same."""
        from safetensors.torch import save

        if self._broken:
            return
        dtype = str(features.dtype).removeprefix("torch.")
        stored = features.detach().to("cpu", torch.bfloat16 if self.dtype == "bfloat16" else features.dtype)
        stored = stored.contiguous()
        payload = save({"features": stored}, self._header(tower, plan_key, stored, dtype))
        if len(payload) > self.max_bytes:
            return
        path = self._path(tower, plan_key)
        try:
            write_atomic(path, lambda f: f.write(payload))
        except (InputError, OSError) as e:
            self._broken = True
            log.warning("features are not kept on disk from here on: %s", e)
            return
        _touch(path)
        self._evict()

    def _path(self, tower: str, plan_key: str) -> Path:
        suffix = "" if self.dtype == "same" else f"-{self.dtype}"
        return self.root / f"{tower[:16]}{suffix}" / f"{plan_key}.safetensors"

    def _header(self, tower: str, plan_key: str, stored: Tensor, dtype: str) -> dict[str, str]:
        """``dtype`` is that of the features before they were ``stored``."""
        identity = [tower, plan_key, dtype, _described("features", stored)]
        checksum = hashlib.sha256(digest(identity).encode())
        checksum.update(_bytes(stored))
        return {"format": FORMAT, "tower": tower, "plan": plan_key, "dtype": dtype, "sha256": checksum.hexdigest()}

    def _evict(self) -> None:
        """Others write as well: what is there is counted anew."""
        files = []
        for path in self.root.glob("*/*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            _remove(path)
            total -= size


def _settings(config: dict[str, Any], *without: str) -> dict[str, Any]:
    """A transformers config without ``without`` and what changes no result, at any depth."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in BOOKKEEPING and key not in without and not str(key).startswith("_")
    }


def _described(name: str, x: Tensor) -> str:
    return f"|{name}|{x.dtype}|{tuple(x.shape)}|"


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _touch(path: Path) -> None:
    """Used now. The file's time, because file systems are often mounted without times of access; in full precision,
    which the kernel's own clock for files lacks."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except OSError:  # another process was faster, or the folder is read-only
        pass


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        log.warning("%s: cannot be deleted (%s)", path, e.strerror)
