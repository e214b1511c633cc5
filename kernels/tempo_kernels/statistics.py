"""What the loss head returns, and what a reference leaves behind: in memory and in a safetensors file.

Shapes: N response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT = "tempo_kernels.HeadStatistics/1"


class HeadStatistics(NamedTuple):
    """What a reference model leaves behind per response token; float32 (float64 from float64 inputs), no gradient.

    ``mean_logit`` [N] and ``mean_embedding`` [N, D] are only needed for the KL and are None without it.
    """

    logp: Tensor
    """[N] log-prob of the label."""
    lse: Tensor
    """[N] logsumexp of the logits."""
    mean_logit: Tensor | None = None
    """[N] mean_embedding · hidden_ref."""
    mean_embedding: Tensor | None = None
    """[N, D] head rows averaged with the reference's probabilities."""

    def save(
        self,
        path: str | os.PathLike[str],
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a safetensors file that :meth:`load` checks: aside first, then renamed, so it is whole or absent.

        Args:
            path: the file; an existing one is replaced.
            weight: [V, D] head the statistics were computed with; ``bias`` [V] likewise. Their digest is stored.
            metadata: what else decides the statistics (a digest of the tokens, the reference's name, ...).

        Raises ValueError for statistics of inconsistent shapes or dtypes. Needs the safetensors package.
        """
        from safetensors.torch import save

        tensors = {k: v.detach().cpu().contiguous() for k, v in self._asdict().items() if v is not None}
        _check(tensors, int(weight.shape[1]), "these statistics")
        header = {
            "format": FORMAT,
            "head": head_digest(weight, bias),
            "metadata": json.dumps(dict(metadata or {}), sort_keys=True),
        }
        payload = save(tensors, header)
        target = Path(path)
        aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(aside, "wb") as f:
                f.write(payload)
                f.flush()
                os.fsync(f.fileno())
            os.replace(aside, target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        weight: Tensor | None,
        *,
        bias: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> HeadStatistics:
        """Read what :meth:`save` wrote.

        Args:
            weight: [V, D] head of the policy, ``bias`` [V] likewise: another one than the file's is refused. None
                where no head is at hand: it is then not checked.
            metadata: every entry must stand in the file with this value.

        Raises ValueError, naming the file and what differs, for another head, other metadata, tensors of a wrong name,
        shape or dtype, values that are not finite, and files of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as f:
                header = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}
        except SafetensorError as e:
            raise ValueError(f"{path}: not a whole safetensors file ({e})") from e
        if header.get("format") != FORMAT:
            raise ValueError(f"{path}: its format is {header.get('format')!r}, expected {FORMAT!r}")
        if weight is not None and header.get("head") != head_digest(weight, bias):
            raise ValueError(
                f"{path}: computed with another head than this one; compute the statistics again with this head"
            )
        stored = json.loads(header.get("metadata", "{}"))
        for name, value in (metadata or {}).items():
            if stored.get(name) != value:
                raise ValueError(f"{path}: its {name} is {stored.get(name)!r}, expected {value!r}")
        _check(tensors, None if weight is None else int(weight.shape[1]), str(path))
        return cls(**{name: value.to(device) for name, value in tensors.items()})


class HeadOutput(NamedTuple):
    """Per-token values, float32 (float64 from float64 inputs)."""

    logp: Tensor
    """[N] log-prob of the label; differentiable."""
    lse: Tensor
    """[N] logsumexp of the logits; carries no gradient."""
    ref_logp: Tensor | None
    """[N] the reference's log-prob of the label; no gradient. None without a reference."""
    kl: Tensor | None
    """[N] KL(ref || policy) over the whole vocabulary; differentiable. None without what it needs."""


def reference_tensors(
    reference: HeadStatistics | Tensor | None, want_kl: bool, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What an operator takes of a reference: live hidden states, or lse, mean_logit and mean_embedding for the KL."""
    if isinstance(reference, Tensor):
        return reference.detach(), None, None, None
    if reference is None or not want_kl:
        return None, None, None, None
    assert reference.mean_logit is not None and reference.mean_embedding is not None
    lse, mean_logit, mean = reference.lse, reference.mean_logit, reference.mean_embedding
    return None, lse.detach().to(dtype), mean_logit.detach().to(dtype), mean.detach().to(dtype)


def output(
    logp: Tensor, lse: Tensor, ref_logp: Tensor, kl: Tensor, reference: HeadStatistics | Tensor | None, want_kl: bool
) -> HeadOutput:
    """An operator's tensors as the caller sees them; ``ref_logp`` is that of a live reference."""
    cached = reference.logp.detach().to(lse.dtype) if isinstance(reference, HeadStatistics) else None
    return HeadOutput(logp, lse, ref_logp if isinstance(reference, Tensor) else cached, kl if want_kl else None)


def head_digest(weight: Tensor, bias: Tensor | None = None) -> str:
    """SHA-256 of dtype, shape and bytes of weight [V, D] and bias [V]."""
    h = hashlib.sha256()
    for tensor in (weight, bias):
        if tensor is None:
            h.update(b"|none|")
            continue
        value = tensor.detach().cpu().contiguous()
        h.update(f"|{value.dtype}|{tuple(value.shape)}|".encode())
        if value.numel():
            # the tensor's own memory: torch alone need not have numpy
            h.update((ctypes.c_char * (value.numel() * value.element_size())).from_address(value.data_ptr()))
    return h.hexdigest()


def _check(tensors: Mapping[str, Tensor], d: int | None, where: str) -> None:
    names = set(tensors)
    scalars, full = {"logp", "lse"}, set(HeadStatistics._fields)
    if names not in (scalars, full):
        raise ValueError(f"{where}: expected {sorted(scalars)} or {sorted(full)}, got {sorted(names)}")
    n, dtype = tensors["logp"].shape[0] if tensors["logp"].ndim else -1, tensors["logp"].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{where}: statistics are float32 or float64, got {dtype}")
    for name, value in tensors.items():
        shape: tuple[int, ...] = (n,)
        if name == "mean_embedding":
            shape = (n, d if d is not None else value.shape[-1] if value.ndim else 0)
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"{where}: {name} must be {list(shape)} of {dtype}, got {list(value.shape)} of {value.dtype}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: {name} holds values that are not finite")
