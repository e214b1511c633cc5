"""One shard of the store: a safetensors file named by the digest of its bytes, whose header lists its answers.

Tensors by form, N rows in all, one answer's rows after the other's::

    scalars             logp [N], lse [N]
    mean_embedding      and mean_logit [N], mean_embedding [N, D]; all float32
    hidden.<dtype>      and hidden [N, D] in the dtype the model runs in: the reference's hidden states, of which the
                        head makes everything else once more

Header (strings): ``format``, ``fields`` (canonical JSON of the reference's identity), ``kl`` ("1" for mean_embedding;
"0" for the others, so that versions that know no hidden states read their scalars), ``form``, ``rows`` (JSON, a list of
key, first row, number of rows). Shards from before ``form`` are scalars or mean_embedding, as ``kl`` says.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tempo_fast.errors import InputError

FORMAT = 1
SUFFIX = ".safetensors"
SCALARS, MEAN = "scalars", "mean_embedding"
_TENSORS = {SCALARS: ("logp", "lse"), MEAN: ("logp", "lse", "mean_logit", "mean_embedding")}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_FIRST_READ = 1 << 14  # most headers are shorter

Row = tuple[str, int, int]
"""Key, first row, number of rows."""
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Makes a tensor to fill, of a shape and a dtype."""


def tensors_of(form: str) -> tuple[str, ...]:
    """Names of a form's tensors."""
    return _TENSORS.get(form, ("logp", "lse", "hidden"))


def form_of(keep: str, dtype: torch.dtype) -> str:
    """The form that ``reference.keep`` asks for. Hidden states have the ``dtype`` the model runs in: they are exact."""
    return MEAN if keep == MEAN else f"hidden.{str(dtype).removeprefix('torch.')}"


class Header(NamedTuple):
    """What a shard says of itself."""

    fields: str
    """Canonical JSON of the reference's identity."""
    form: str
    rows: list[Row]
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    """Tensor name -> dtype, shape, first byte in the file."""
    size: int
    """Bytes of the file."""

    @property
    def tokens(self) -> int:
        return sum(n for _, _, n in self.rows)


class Encoded(NamedTuple):
    """A shard to be written."""

    name: str
    chunks: list[Any]
    """Bytes-like, in order."""
    size: int

    def write(self, f: BinaryIO) -> None:
        for chunk in self.chunks:
            f.write(chunk)


def encode(form: str, fields: str, rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> Encoded:
    """A shard of the form's ``tensors``, on the CPU.

    The same answers give the same bytes, and so the same name, whoever writes them; safetensors' own writer puts the
    header's strings in any order.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "format": str(FORMAT), "fields": fields, "kl": str(int(form == MEAN)), "form": form,
            "rows": json.dumps(rows),
        }
    }  # fmt: skip
    chunks: list[Any] = []
    end = 0
    for name in tensors_of(form):  # hidden states last: the others' numbers are no narrower
        tensor = tensors[name].contiguous()
        start, end = end, end + tensor.numel() * tensor.element_size()
        told = next(k for k, v in _DTYPES.items() if v == tensor.dtype)
        header[name] = {"dtype": told, "shape": list(tensor.shape), "data_offsets": [start, end]}
        chunks.append(tensor.view(-1).view(torch.uint8).numpy())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = [len(text).to_bytes(8, "little") + text, *chunks]
    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return Encoded(h.hexdigest() + SUFFIX, chunks, 8 + len(text) + end)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Raises OSError when the file cannot be read, ValueError when it is no shard of this format or cut off."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        start = os.read(fd, _FIRST_READ)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= size - 8:
            raise ValueError("header size")
        while len(start) < 8 + length:
            more = os.read(fd, 8 + length - len(start))
            if not more:
                raise ValueError("cut off")
            start += more
    finally:
        os.close(fd)
    try:
        parts: dict[str, Any] = json.loads(start[8 : 8 + length])
        header = parts.pop("__metadata__")
        rows = [(str(key), int(first), int(n)) for key, first, n in json.loads(header["rows"])]
        form = str(header.get("form") or (MEAN if header["kl"] == "1" else SCALARS))
        places, end = {}, 8 + length
        for name, told in parts.items():
            first, last = told["data_offsets"]
            places[name] = (_DTYPES[told["dtype"]], tuple(told["shape"]), 8 + length + first)
            end = max(end, 8 + length + last)
        fields = str(header["fields"])
        known = header["format"] == str(FORMAT)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{type(e).__name__} in the header") from e
    if not known:
        raise ValueError(f"format {header['format']!r}, this version reads {FORMAT}")
    if set(tensors_of(form)) - set(places) or end != size:
        raise ValueError("not the tensors, or not the size, that its header tells")
    return Header(fields, form, rows, places, size)


def digest_of(name: str) -> str:
    """The digest that a shard's name promises."""
    return name.removesuffix(SUFFIX)


class Mapped:
    """A shard's tensors as views on the memory-mapped file, which is never written. No file handle is kept.

    Raises OSError when the file is gone, ValueError as ``read_header``, InputError when the system maps no more.
    """

    def __init__(self, path: Path, header: Header | None = None) -> None:
        header = header or read_header(path)
        whole = _map(path, header.size)
        self.address = whole.data_ptr()
        self.tensors: dict[str, Tensor] = {}
        for name, (dtype, shape, first) in header.places.items():
            count = dtype.itemsize
            for n in shape:
                count *= n
            self.tensors[name] = whole[first : first + count].view(dtype).view(shape)

    def willneed(self, start: int, n: int) -> None:
        """Tell the system that these rows are read soon."""
        for tensor in self.tensors.values():
            width = tensor.element_size() * math.prod(tensor.shape[1:])
            _advise(tensor.data_ptr() + start * width, n * width)


def copy_rows(
    runs: Sequence[tuple[Mapped, int, int]], names: Sequence[str], empty: Empty | None = None
) -> dict[str, Tensor]:
    """These tensors of rows [start, end) of shards, one run after the other, in tensors that ``empty`` makes."""
    total = sum(end - start for _, start, end in runs)
    make = empty or (lambda shape, dtype: torch.empty(shape, dtype=dtype))
    out = {}
    for name in names:
        parts = [(shard.tensors[name], start, end) for shard, start, end in runs]
        like = parts[0][0] if parts else torch.empty(0)
        out[name] = make((total, *like.shape[1:]), like.dtype)
        at, bytes_out = 0, _bytes(out[name])
        for tensor, start, end in parts:
            # by bytes, on this thread alone: torch would start its pool for every answer
            bytes_out[at : at + end - start] = _bytes(tensor)[start:end]
            at += end - start
    return out


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor [N, ...] as numpy bytes [N, width]."""
    return tensor.view(len(tensor), -1).view(torch.uint8).numpy() if tensor.numel() else tensor.view(0).numpy()


def _advise(address: int, length: int) -> None:
    """madvise(WILLNEED) where the system has it."""
    wanted = getattr(mmap, "MADV_WILLNEED", None)
    if wanted is None or not length:
        return
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), wanted)


def _map(path: Path, size: int) -> Tensor:
    problem: Exception | None = None
    for _ in range(3):  # gc may have moved it aside and back in between
        try:
            return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as e:
            problem = e
        if os.stat(path).st_size != size:
            raise ValueError("cut off") from problem
    raise InputError(f"{path}: cannot be mapped into memory ({problem})") from problem
