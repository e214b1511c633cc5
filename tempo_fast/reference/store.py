"""Statistics of a frozen reference, one entry per answer, found again by what was computed rather than by position.

On disk::

    manifest.json          the identity fields, and what only changes rounding; for people and for refusing a mix-up
    shards/<sha256>.safetensors   one per ``put``; the name is the digest of the file's bytes, the header lists its keys
    live/                  who uses the folder; only ``tempo-fast reference gc`` looks

Nothing but the shards is needed to open a store: the index is made from their headers. A shard is written aside, synced
and renamed, so a process killed at any moment leaves whole shards only, and any number of processes on any number of
machines may write: no lock is taken. A shard is verified against its name the first time it is used; a damaged one is
deleted and its answers are missing again. After that answers are read through memory maps.

Shapes: N response tokens of all asked-for answers, D hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, digest, drop_stale, file_digest, write_atomic
from tempo_fast.models.load import Bundle
from tempo_fast.reference.holders import Holder
from tempo_fast.reference.index import Entry, Index
from tempo_fast.reference.manifest import check_manifest, touch
from tempo_fast.reference.shard import (
    MEAN,
    SCALARS,
    SUFFIX,
    Empty,
    Header,
    Mapped,
    Row,
    copy_rows,
    digest_of,
    encode,
    form_of,
    read_header,
    tensors_of,
)
from tempo_fast.trees.attention import choose
from tempo_fast.trees.layout import ResponseTree
from tempo_kernels.head import HeadStatistics

log = logging.getLogger("tempo_fast")

_OPEN_SHARDS = 1024  # a map holds no file handle
_THREADS = 8  # a shared file system answers many at once; hashing lets go of the interpreter
_PATIENCE_S = 10.0  # another machine may see a new file that much later


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


class ReferenceStore:
    """Statistics of one reference in one folder. Threads may share it.

    Args:
        root: folder, made on the first use. Several processes may use it at once.
        fields: what identifies the reference and everything else that decides its statistics and is not in a record:
            digests of weights and head, and so on. JSON values.
        compatible: what only changes rounding (dtype, versions); kept in the manifest, a difference is logged.
        form: in what form the KL's part is kept, see ``shard.py`` and ``form_of``.

    Attributes:
        kl: whether entries must hold what the exact KL needs; the default of ``missing``, ``get`` and ``read``.
        hits, misses: answers that were asked for and found, or not found.

    Raises:
        InputError: the folder holds another reference's statistics (the field is named) or cannot be written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fields: Mapping[str, Any],
        *,
        compatible: Mapping[str, Any] | None = None,
        form: str = MEAN,
    ) -> None:
        self.root = Path(root)
        self.fields = dict(fields)
        self.form = form
        self.kl = False
        self.hits = self.misses = 0
        self._identity = digest(self.fields)
        self._shards = self.root / "shards"
        self._lock = threading.RLock()
        self._index = Index()
        self._known: set[str] = set()
        self._sound: set[str] = set()
        self._open: OrderedDict[str, Mapped] = OrderedDict()
        check_manifest(self.root, self.fields, dict(compatible or {}))
        self.holder = Holder(self.root)  # before the shards are listed
        drop_stale(self._shards)
        self.refresh()

    def __len__(self) -> int:
        """Answers in the index."""
        return len(self.known(kl=False))

    def known(self, *, kl: bool | None = None) -> list[str]:
        """Keys of the answers in the index, sorted; their shards may still prove damaged."""
        forms = self._forms(kl)
        with self._lock:
            return self._index.keys(forms)

    # -- keys --------------------------------------------------------------------------------------------------------

    def keys(self, tree: ResponseTree) -> list[str]:
        """A digest per branch: of identity, videos, prompt (tokens and positions) and the answer's tokens; not of names
        or order."""
        h = hashlib.sha256(self._identity.encode())
        for plan in tree.plans:
            h.update(f"|{plan.key}".encode())
        for values in (tree.prompt.input_ids, tree.prompt.position_ids):
            _add_tokens(h, values)
        out = []
        for branch in tree.branches:
            of_answer = h.copy()
            _add_tokens(of_answer, torch.tensor(branch.input_ids, dtype=torch.int64))
            out.append(of_answer.hexdigest())
        return out

    def key(self, tree: ResponseTree, branch: int) -> str:
        """``keys(tree)[branch]``"""
        return self.keys(tree)[branch]

    # -- reading -----------------------------------------------------------------------------------------------------

    def missing(self, keys: Sequence[str], *, kl: bool | None = None) -> list[str]:
        """The ``keys`` that are not there, or without what the KL needs, or in a damaged shard; in order, once each."""
        forms = self._forms(kl)
        with self._lock:
            self.holder.beat()
            self.verify(self.shards_of(keys, kl=kl))
            return [key for key in dict.fromkeys(keys) if self._find(key, forms) is None]

    def get(self, keys: Sequence[str], kl: bool | None = None, *, device: torch.device | str = "cpu") -> HeadStatistics:
        """Statistics of the answers, their tokens one answer after the other.

        Returns:
            logp [N], lse [N], and with ``kl`` mean_logit [N] and mean_embedding [N, D], else None; float32.

        Raises:
            InputError: some are missing.
        """
        form = MEAN if self._kl(kl) else SCALARS
        found = self.rows(keys, (MEAN,) if form == MEAN else self._forms(False), tensors_of(form))
        self.hits += len(keys)
        return HeadStatistics(**{name: value.to(device) for name, value in found.items()})

    def read(self, keys: Sequence[str], kl: bool | None = None, *, empty: Empty | None = None) -> Reference:
        """What the loss head takes as its reference, in the store's form; on the CPU, and not counted as hits.

        Args:
            empty: makes the tensors to fill, of a shape and a dtype; None makes new ones.

        Returns:
            ``get``'s statistics, or with ``kl`` in a store of hidden states those, [N, D].

        Raises:
            InputError: some are missing.
        """
        form = self._kept(kl)
        names = tensors_of(form) if form in (SCALARS, MEAN) else ("hidden",)
        found = self.rows(keys, self._forms(kl), names, empty)
        return found["hidden"] if "hidden" in found else HeadStatistics(**found)

    def rows(
        self, keys: Sequence[str], forms: Sequence[str], names: Sequence[str], empty: Empty | None = None
    ) -> dict[str, Tensor]:
        """These tensors of the answers, each in the first of ``forms`` that holds it, one after the other."""
        with self._lock:
            self.holder.beat()
            found = [self._place(key, forms) for key in keys]
        absent = sum(place is None for place in found)
        if absent:
            self.hits += len(keys) - absent
            self.misses += absent
            raise InputError(
                f"{self.root}: the reference statistics of {absent} of {len(keys)} answers are missing or damaged;"
                " run the reference step again"
            )
        runs: list[tuple[Mapped, int, int]] = []  # answers that lie side by side are copied at once
        for place in found:
            assert place is not None
            shard, entry = place
            if runs and runs[-1][0] is shard and runs[-1][2] == entry.start:
                runs[-1] = (shard, runs[-1][1], entry.start + entry.n)
            else:
                runs.append((shard, entry.start, entry.start + entry.n))
        return copy_rows(runs, names, empty)

    def willneed(self, keys: Sequence[str], kl: bool | None = None) -> None:
        """Tell the system that these answers are read soon: it begins to read them from the disk."""
        forms = self._forms(kl)
        with self._lock:
            found = [place for key in keys if (place := self._place(key, forms, verify=False)) is not None]
        for shard, entry in found:
            shard.willneed(entry.start, entry.n)

    def refresh(self) -> None:
        """Take up the shards that other processes have written since."""
        try:
            with os.scandir(self._shards) as files:
                names = sorted(f.name for f in files if f.name.endswith(SUFFIX) and f.name[0] != ".")
        except FileNotFoundError:
            return
        with self._lock:
            self._take_up([name for name in names if name not in self._known])

    def adopt(self, names: Iterable[str]) -> None:
        """Take up shards that other processes say they have written. Listings of a shared folder may be some seconds
        old on another machine, so they are opened by name, and waited for."""
        end = time.monotonic() + _PATIENCE_S
        with self._lock:
            left = [name for name in names if name not in self._known]
            while left and time.monotonic() < end:
                self._take_up(left)
                left = [name for name in left if name not in self._known]
                if left:
                    time.sleep(0.05)
        if left:
            log.warning("%s: %d new shards cannot be seen from here (%s)", self._shards, len(left), left[0])

    # -- verifying ---------------------------------------------------------------------------------------------------

    def shards_of(self, keys: Sequence[str], *, kl: bool | None = None) -> list[str]:
        """The shards, in order, that hold these answers and have not been verified yet."""
        forms = self._forms(kl)
        with self._lock:
            every = (self._index.find(key, forms) for key in keys)
            return sorted({e.shard for e in every if e is not None and e.shard not in self._sound})

    def verify(self, shards: Sequence[str]) -> tuple[list[str], list[str]]:
        """Read these shards and drop those whose bytes do not have the digest of their name.

        Returns:
            (sound, damaged) names; a shard that is gone is in neither.
        """
        threads = min(_THREADS, len(shards), os.cpu_count() or 1)
        if threads > 1:
            with ThreadPoolExecutor(threads, "tempo-fast-verify") as pool:
                found = dict(zip(shards, pool.map(self._state, shards), strict=True))
        else:
            found = {shard: self._state(shard) for shard in shards}
        sound = [shard for shard, state in found.items() if state is True]
        damaged = [shard for shard, state in found.items() if state is False]
        self.trust(sound)
        with self._lock:
            self._forget([shard for shard, state in found.items() if state is None])
            for shard in damaged:
                self._drop(shard, "its bytes do not have the digest of its name")
        return sound, damaged

    def trust(self, shards: Iterable[str]) -> None:
        """These shards have been verified, here or by another rank."""
        with self._lock:
            self._sound.update(shards)

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, entries: Mapping[str, HeadStatistics], hidden: Mapping[str, Tensor] | None = None) -> str:
        """Write one shard with these answers' statistics, all with or all without what the KL needs.

        Args:
            entries: by key; float32 is kept.
            hidden: by key, hidden states [n, D] of the reference, kept as they are in place of the mean embeddings.

        Returns:
            The shard's name; "" when there is nothing to write.

        Raises:
            InputError: full disk, read-only folder.
        """
        if not entries:
            return ""
        kinds = {s.mean_embedding is not None and s.mean_logit is not None for s in entries.values()}
        if len(kinds) > 1:
            raise ValueError("put takes entries that all have or all lack what the KL needs")
        form = MEAN if kinds.pop() else SCALARS
        tensors = {}
        if hidden is not None:
            tensors["hidden"] = torch.cat([hidden[key].detach().cpu() for key in entries])
            form = form_of("hidden", tensors["hidden"].dtype)
        for name in tensors_of(form):
            if name != "hidden":
                tensors[name] = torch.cat([getattr(s, name).detach().float().cpu() for s in entries.values()])
        rows: list[Row] = []
        start = 0
        for key, s in entries.items():
            rows.append((key, start, len(s.logp)))
            start += len(s.logp)
        shard = encode(form, canonical_json(self.fields), rows, tensors)
        name = shard.name
        write_atomic(self._shards / name, shard.write)
        with self._lock:
            self.holder.beat()
            self._known.add(name)
            self._sound.add(name)
            self._index.enter(name, Header(canonical_json(self.fields), form, rows, {}, shard.size))
        return name

    # -- inside ------------------------------------------------------------------------------------------------------

    def _kl(self, kl: bool | None) -> bool:
        return self.kl if kl is None else kl

    def _kept(self, kl: bool | None) -> str:
        return self.form if self._kl(kl) else SCALARS

    def _forms(self, kl: bool | None) -> tuple[str, ...]:
        """The forms that serve, best first: every one holds the scalars."""
        if self._kl(kl):
            return (self.form,)
        return self._index.forms()

    def _take_up(self, names: Sequence[str]) -> None:
        """Read shards' headers into the index; an unreadable one is dropped, one that is not there left for later."""
        if len(names) > 64:
            with ThreadPoolExecutor(_THREADS, "tempo-fast-open") as pool:
                found = list(pool.map(self._header, names))
        else:
            found = [self._header(name) for name in names]
        foreign = []
        for name, header in zip(names, found, strict=True):
            if header is None:
                continue
            self._known.add(name)
            if isinstance(header, Exception):
                self._drop(name, f"unreadable ({header})")
            elif header.fields == canonical_json(self.fields):
                self._index.enter(name, header)
            else:  # of another identity, or damaged in just that field
                foreign.append(name)
        if foreign:
            self.verify(foreign)

    def _header(self, name: str) -> Header | Exception | None:
        try:
            return read_header(self._shards / name)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            return e

    def _leave(self, shard: str) -> int:
        """Take a shard out; returns how many answers no other shard holds in its form."""
        self._open.pop(shard, None)
        self._sound.discard(shard)
        return self._index.leave(shard)

    def _find(self, key: str, forms: Sequence[str]) -> Entry | None:
        """The entry, its shard verified; None when it is missing."""
        while (entry := self._index.find(key, forms)) is not None and entry.shard not in self._sound:
            self.verify([entry.shard])
        return entry

    def _place(self, key: str, forms: Sequence[str], *, verify: bool = True) -> tuple[Mapped, Entry] | None:
        """The entry and its open shard. One that is gone has been merged into another, or cleaned away."""
        while (entry := self._find(key, forms) if verify else self._index.find(key, forms)) is not None:
            try:
                return self._opened(entry.shard), entry
            except OSError:
                self._forget([entry.shard])
            except ValueError as e:
                self._drop(entry.shard, str(e))
        return None

    def _forget(self, shards: Sequence[str]) -> None:
        """Shards that are gone: ``gc`` in another process may have merged their answers into a new one."""
        for shard in shards:
            log.info("%s: %s is gone; looking for its answers elsewhere", self._shards, shard)
            self._leave(shard)
            self._known.discard(shard)
        if shards:
            self.refresh()

    def _state(self, shard: str) -> bool | None:
        """Whether the file's bytes have the digest of its name; None when it is not there."""
        path = self._shards / shard
        try:
            sound = file_digest(path) == digest_of(shard)
        except InputError:
            return False if path.exists() else None
        touch(path)  # when it was last used, for gc
        return sound

    def _drop(self, shard: str, why: str) -> None:
        lost = self._leave(shard)
        self._known.discard(shard)  # the same answers, computed again, make a shard of the same name
        where = self._shards / shard
        log.warning("%s: damaged shard dropped, %d answers are computed again: %s", where, lost, why)
        aside = where.with_name(f".{shard}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            os.replace(where, aside)
            if file_digest(aside) == digest_of(shard):  # another process has already written it anew
                os.replace(aside, where)
            else:
                aside.unlink()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise InputError(f"{where}: damaged and cannot be deleted ({e.strerror})") from e

    def _opened(self, shard: str) -> Mapped:
        """A memory-mapped shard; those used last stay open."""
        if shard not in self._open:
            header = self._index.headers.get(shard)
            path = self._shards / shard
            self._open[shard] = Mapped(path, header if header and header.places else None)
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


Reference = HeadStatistics | Tensor
"""What the loss head takes: statistics, or the reference's hidden states [N, D]."""


def _add_tokens(h: Any, values: Tensor) -> None:
    h.update(f"|{tuple(values.shape)}|".encode())
    h.update(values.to(torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())
