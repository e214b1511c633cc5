"""Statistics of a frozen reference, one entry per answer, found again by what was computed rather than by position.

On disk::

    manifest.json          the identity fields, and what only changes rounding; for people and for refusing a mix-up
    shards/<sha256>.safetensors   one per ``put``; the name is the digest of the file's bytes, the header lists its keys

Nothing else is needed to open a store: the index is made from the shards' headers. A shard is written aside, synced and
renamed, so a process killed at any moment leaves whole shards only. A shard is verified against its name the first time
it is used; a damaged one is deleted and its answers are missing again.

Shapes: N response tokens of all asked-for answers, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, digest, drop_stale, file_digest, read_json, write_atomic, write_json
from tempo_fast.models.load import Bundle
from tempo_fast.trees.attention import choose
from tempo_fast.trees.layout import ResponseTree
from tempo_kernels.head import HeadStatistics

log = logging.getLogger("tempo_fast")

FORMAT = 1
_SCALARS = ("logp", "lse")
_MEANS = ("mean_logit", "mean_embedding")
_OPEN_SHARDS = 64


def reference_fields(bundle: Bundle) -> dict[str, Any]:
    """The identity of a reference: a store with other ``fields`` is refused. Prompts and answers are in the keys."""
    return {"reference": bundle.weights_digest, "config": bundle.config_digest, "family": bundle.family.name}


def compatible_fields(bundle: Bundle, attention: str = "auto") -> dict[str, Any]:
    """What only changes rounding: kept in the manifest, a difference is logged; ``attention`` as train.attention."""
    import transformers

    text = bundle.config.get_text_config()
    return {
        "dtype": str(bundle.dtype).removeprefix("torch."),
        "device": bundle.device.type,
        "attention": choose(attention, text, bundle.device, bundle.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


class Entry(NamedTuple):
    """Where an answer's statistics lie: rows ``start .. start + n`` of a shard."""

    shard: str
    start: int
    n: int
    kl: bool


class ReferenceStore:
    """Statistics of one reference in one folder.

    Args:
        root: folder, made on the first use. Several processes may use it at once.
        fields: what identifies the reference and everything else that decides its statistics and is not in a record:
            digests of weights and head, and so on. JSON values.
        compatible: what only changes rounding (dtype, versions); kept in the manifest, a difference is logged.

    Attributes:
        kl: whether entries must hold what the exact KL needs; the default of ``missing`` and ``get``.
        hits, misses: answers that ``get`` found and did not find.

    Raises:
        InputError: the folder holds another reference's statistics (the field is named) or cannot be written.
    """

    def __init__(
        self, root: str | os.PathLike[str], fields: Mapping[str, Any], *, compatible: Mapping[str, Any] | None = None
    ) -> None:
        self.root = Path(root)
        self.fields = dict(fields)
        self.kl = False
        self.hits = self.misses = 0
        self._identity = digest(self.fields)
        self._shards = self.root / "shards"
        self._index: dict[str, Entry] = {}
        self._known: set[str] = set()
        self._sound: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._check_manifest(dict(compatible or {}))
        drop_stale(self._shards)
        self.refresh()

    def __len__(self) -> int:
        """Answers in the index."""
        return len(self._index)

    # -- keys --------------------------------------------------------------------------------------------------------

    def key(self, tree: ResponseTree, branch: int) -> str:
        """Digest of identity, videos, prompt (tokens and positions) and the answer's tokens; not of names or order."""
        h = hashlib.sha256(self._identity.encode())
        for plan in tree.plans:
            h.update(f"|{plan.key}".encode())
        answer = torch.tensor(tree.branches[branch].input_ids, dtype=torch.int64)
        for values in (tree.prompt.input_ids, tree.prompt.position_ids, answer):
            h.update(f"|{tuple(values.shape)}|".encode())
            h.update(values.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
        return h.hexdigest()

    # -- reading -----------------------------------------------------------------------------------------------------

    def missing(self, keys: Sequence[str], *, kl: bool | None = None) -> list[str]:
        """The ``keys`` that are not there, or without what the KL needs, or in a damaged shard; in order, once each."""
        kl = self.kl if kl is None else kl
        return [key for key in dict.fromkeys(keys) if self._find(key, kl) is None]

    def get(self, keys: Sequence[str], kl: bool | None = None, *, device: torch.device | str = "cpu") -> HeadStatistics:
        """Statistics of the answers, their tokens one answer after the other.

        Returns:
            logp [N], lse [N], and with ``kl`` mean_logit [N] and mean_embedding [N, D], else None; float32.

        Raises:
            InputError: some are missing.
        """
        kl = self.kl if kl is None else kl
        found = [self._find(key, kl) for key in keys]
        absent = sum(entry is None for entry in found)
        self.hits += len(found) - absent
        self.misses += absent
        if absent:
            raise InputError(
                f"{self.root}: the reference statistics of {absent} of {len(keys)} answers are missing or damaged;"
                " run the reference step again"
            )
        names = _SCALARS + _MEANS if kl else _SCALARS
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        for entry in found:
            assert entry is not None
            shard = self._opened(entry.shard)
            for name in names:
                pieces[name].append(shard.get_slice(name)[entry.start : entry.start + entry.n])
        joined = {name: torch.cat(values).to(device) if values else torch.empty(0) for name, values in pieces.items()}
        return HeadStatistics(**joined)

    def refresh(self) -> None:
        """Take up the shards that other processes have written since."""
        for path in sorted(self._shards.glob("*.safetensors")):
            if path.name not in self._known:
                self._known.add(path.name)
                self._add(path)

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, entries: Mapping[str, HeadStatistics]) -> None:
        """Write one shard with these answers' statistics, all with or all without what the KL needs.

        Raises:
            InputError: full disk, read-only folder.
        """
        if not entries:
            return
        from safetensors.torch import save

        kinds = {s.mean_embedding is not None and s.mean_logit is not None for s in entries.values()}
        if len(kinds) > 1:
            raise ValueError("put takes entries that all have or all lack what the KL needs")
        kl = kinds.pop()
        tensors = {
            name: torch.cat([getattr(s, name).detach().float().cpu() for s in entries.values()])
            for name in (_SCALARS + _MEANS if kl else _SCALARS)
        }
        rows, start = [], 0
        for key, s in entries.items():
            rows.append([key, start, len(s.logp)])
            start += len(s.logp)
        header = {
            "format": str(FORMAT), "fields": canonical_json(self.fields), "kl": str(int(kl)), "rows": json.dumps(rows)
        }  # fmt: skip
        payload = save(tensors, header)
        path = self._shards / f"{hashlib.sha256(payload).hexdigest()}.safetensors"
        write_atomic(path, lambda f: f.write(payload))
        self._known.add(path.name)
        self._sound.add(path.name)
        self._enter(path.name, rows, kl)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _check_manifest(self, compatible: dict[str, Any]) -> None:
        path = self.root / "manifest.json"
        ours = {"format": FORMAT, "fields": self.fields, "compatible": compatible}
        if not path.is_file():
            write_json(path, ours)
            return
        try:
            stored = read_json(path)
            fields = dict(stored["fields"])
        except (InputError, KeyError, TypeError, ValueError):
            log.warning("%s: damaged, written again (every shard carries its own identity)", path)
            write_json(path, ours)
            return
        if stored.get("format") != FORMAT:
            raise InputError(f"{path}: field 'format' is {stored.get('format')!r}, this version reads {FORMAT}")
        for name in sorted(set(fields) | set(self.fields)):
            if canonical_json(fields.get(name)) != canonical_json(self.fields.get(name)):
                raise InputError(
                    f"{path}: field '{name}' is {fields.get(name)!r} there and {self.fields.get(name)!r} in this run;"
                    " the statistics belong to another reference, use another reference.store"
                )
        for name in sorted(set(compatible) & set(stored.get("compatible") or {})):
            if stored["compatible"][name] != compatible[name]:
                log.info(
                    "%s: filled with %s %s, this run has %s; equal within rounding",
                    path, name, stored["compatible"][name], compatible[name],
                )  # fmt: skip

    def _add(self, path: Path) -> None:
        """Read a shard's header into the index; an unreadable one is dropped."""
        try:
            with open(path, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                if not 2 <= size <= path.stat().st_size - 8:
                    raise ValueError("header size")
                header = json.loads(f.read(size))["__metadata__"]
            rows = [(str(k), int(s), int(n)) for k, s, n in json.loads(header["rows"])]
            same = header["format"] == str(FORMAT) and header["fields"] == canonical_json(self.fields)
            kl = header["kl"] == "1"
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, UnicodeDecodeError) as e:
            self._drop(path.name, f"unreadable ({type(e).__name__})")
            return
        if same:
            self._enter(path.name, rows, kl)
        else:  # of another identity, or damaged in just that field
            self._verify(path.name)

    def _enter(self, shard: str, rows: Sequence[Sequence[Any]], kl: bool) -> None:
        for key, start, n in rows:
            known = self._index.get(key)
            if known is None or kl or not known.kl:
                self._index[key] = Entry(shard, start, n, kl)

    def _find(self, key: str, kl: bool) -> Entry | None:
        """The entry, its shard verified; None when it is missing."""
        while (entry := self._index.get(key)) is not None:
            if kl and not entry.kl:
                return None
            if entry.shard in self._sound or self._verify(entry.shard):
                return entry
        return None

    def _verify(self, shard: str) -> bool:
        """Whether the file's bytes have the digest of its name. A shard that fails is dropped."""
        try:
            sound = file_digest(self._shards / shard) == shard.removesuffix(".safetensors")
        except InputError:
            sound = False
        if sound:
            self._sound.add(shard)
        else:
            self._drop(shard, "its bytes do not have the digest of its name")
        return sound

    def _drop(self, shard: str, why: str) -> None:
        lost = [key for key, entry in self._index.items() if entry.shard == shard]
        where = self._shards / shard
        log.warning("%s: damaged shard dropped, %d answers are computed again: %s", where, len(lost), why)
        for key in lost:
            del self._index[key]
        self._open.pop(shard, None)
        try:
            where.unlink(missing_ok=True)
        except OSError as e:
            raise InputError(f"{where}: damaged and cannot be deleted ({e.strerror})") from e
        # an older, scalars-only entry of these answers may be in another shard
        for other in sorted(self._known - {shard}):
            path = self._shards / other
            if path.is_file() and lost:
                self._add(path)

    def _opened(self, shard: str) -> Any:
        """A memory-mapped shard; the last few stay open."""
        from safetensors import safe_open

        if shard not in self._open:
            self._open[shard] = safe_open(str(self._shards / shard), framework="pt").__enter__()
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].__exit__(None, None, None)
        self._open.move_to_end(shard)
        return self._open[shard]
