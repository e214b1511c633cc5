"""``python -m bench formats``: preference data through every format and back: what is lost, how fast, in what memory.

``chains``: random records (``random_records``), native -> A -> B -> native for every ordered pair of formats, the
digest of the records' canonical JSON compared; ``write`` and ``read`` are rows per second of CPU time of the
conversions that begin and end in native JSON lines, grouping included. ``memory``: the highest resident memory (VmHWM)
of a process that converts native -> A -> native, by number of records; ``grown`` is the largest over the smallest.
``broken``: a file in which one row in a hundred is spoiled; the others must come through, and the problems must name
exactly those. Exit code 1 where one of these fails; ``--bound`` is the MiB that memory may grow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tempo_fast.files import canonical_json
from tempo_fast.pairs.formats import iter_pairs, write_pairs
from tempo_fast.pairs.formats.native import EXTRA
from tempo_fast.schema import PreferenceRecord, Rejected

KINDS = {
    "native": ("native", ".jsonl"),
    "trl": ("trl", ".jsonl"),
    "ms-swift": ("ms-swift", ".jsonl"),
    "llama-factory": ("llama-factory", ".json"),
    "rrpo": ("rrpo", ".json.gz"),
    "llava-hound": ("llava-hound", ".jsonl.gz"),
    "parquet": ("native", ".parquet"),
    "hf": ("trl", ""),
}
"""Each format, and each container with one of them: (format, what the file's name ends with; nothing: a folder)."""

PIECES = (
    "a dog", "runs left", "3.5 s", "Der Bär ißt Öl", "他在跑", "🎬", "\U0001f469\u200d\U0001f467", "🇳🇴", "e\u0301",
    "𝔘", "مرحبا بالعالم", "שלום", "\u202eabc", "\u2028", "\ufeff", "\n", "\r\n", "\r", "\t", "  ", '"', "'",
    "“x”", "\\", "\\u00e9", "\\n", "</s>", "<video>", "<image>", "<MASK>", "</MASK>", "<MASK>x</MASK>",
    "<|im_end|>", '{"a": [1, 2]}', "}, {", "], [", "null", "NaN", "\x7f", ",",
)  # fmt: skip


def _text(rng: random.Random, most: int = 24) -> str:
    text = "".join(rng.choice(PIECES) + rng.choice(("", " ", ". ")) for _ in range(rng.randint(1, most)))
    return text if text.strip() else text + "x"


def _spans(rng: random.Random, text: str) -> list[list[int]]:
    ends = sorted(rng.sample(range(len(text) + 1), min(len(text) + 1, 2 * rng.randint(0, 3)) // 2 * 2))
    return [list(pair) for pair in zip(ends[::2], ends[1::2], strict=True)]


def random_records(count: int, seed: int = 0) -> Iterator[PreferenceRecord]:
    """Records whose texts hold what formats, JSON and Unicode stumble over; 1 to 3 rejected answers, spans, extra."""
    for i in range(count):
        rng = random.Random(f"{seed}/{i}")
        chosen, r = _text(rng), rng.choice((2, 4, 8, 16))
        answers = []
        for kind in rng.sample(("drop", "shuffle", "reverse"), rng.randint(1, 3)):
            text = _text(rng)
            order = rng.sample(range(9), rng.randint(0, 9))
            blank = [rng.random() < 0.5 for _ in order]
            answers.append(
                Rejected(
                    text, kind, r, order, rng.random(), rng.random(), _spans(rng, text), _spans(rng, chosen), blank
                )
            )
        provenance: dict[str, Any] = {}
        if rng.random() < 0.7:
            provenance = {
                "engine": {"name": _text(rng, 3), "T": 0.7, "top_k": None},
                "seed": rng.getrandbits(70),
                "ü": [i, -0.5],
            }
        if rng.random() < 0.3:
            provenance[EXTRA] = [{"chosen_score": rng.random(), "answer": _text(rng, 3), "id": i} for _ in answers]
        video = "" if rng.random() < 0.1 else f"dir {i % 7}/ü{i}.mp4"
        yield PreferenceRecord(f"v{i}/r{r}", video, _text(rng), chosen, answers, r, _spans(rng, chosen), provenance)


def many_records(count: int) -> Iterator[PreferenceRecord]:
    """As ``random_records``, and faster made: the texts of a hundred, each time under another number."""
    some = list(random_records(100))
    for i in range(count):
        record = some[i % 100]
        yield replace(record, id=f"v{i}", prompt=f"{i}: {record.prompt}")


def content(records: Iterable[PreferenceRecord]) -> str:
    """SHA-256 of the canonical JSON of the records, in order."""
    h = hashlib.sha256()
    for record in records:
        h.update(canonical_json(record).encode() + b"\n")
    return h.hexdigest()


def quiet(problem: object) -> None:
    """Texts that hold tags are remarked on; here they are meant to."""


def step(source: Path, kind: str, folder: Path) -> Path:
    """Convert ``source``, whose format is told by its rows, into ``kind``, in ``folder``."""
    fmt, suffix = KINDS[kind]
    out = folder / f"{kind}{suffix}"
    write_pairs(out, iter_pairs(source, problems=quiet), fmt, problems=quiet)
    return out


def chains(
    count: int, folder: Path, kinds: Iterable[str] = KINDS, seed: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """(speed of each kind, the ordered pairs that lose something)."""
    kinds = list(kinds)
    native = folder / "source.jsonl"
    write_pairs(native, random_records(count, seed))
    true, answers = content(iter_pairs(native)), sum(len(x.rejected) for x in iter_pairs(native))
    rows, lost = [], []
    for a in kinds:
        (folder / a).mkdir()
        began = time.process_time()
        first = step(native, a, folder / a)
        write_s, read_s = time.process_time() - began, 0.0
        for b in kinds:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                second = step(first, b, Path(place))
                began = time.process_time()
                back = step(second, "native", Path(place))
                read_s += (time.process_time() - began) if a == b else 0.0
                if content(iter_pairs(back)) != true:
                    lost.append(f"{a} -> {b}")
        n = count if KINDS[a][0] == "native" else answers
        size = sum(p.stat().st_size for p in [first, *first.rglob("*")] if p.is_file())
        rows.append({"kind": a, "rows": n, "write": n / write_s, "read": n / read_s, "mib": size / 2**20})
    return rows, lost


_CHILD = """
import sys
from pathlib import Path
from bench.formats import many_records, step, write_pairs
folder = Path(sys.argv[1])
source = folder / "source.jsonl"
write_pairs(source, many_records(int(sys.argv[3])))
step(step(source, sys.argv[2], folder), "native", folder)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def memory(kind: str, count: int) -> float:
    """Highest resident MiB of a process that takes ``count`` records to ``kind`` and back."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, folder, kind, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(done.stdout) / 1024


NEEDED = {
    "native": "chosen", "trl": "chosen", "ms-swift": "rejected_response", "llama-factory": "rejected",
    "rrpo": "answer_masked", "llava-hound": "rejected",
}  # fmt: skip
SPOILED = ("cut", "missing", "type", "utf8", "empty", "nul", "nul_escaped", "half", "array", "text")


def spoil(line: bytes, how: str, field: str, rng: random.Random) -> bytes:
    """One good line of JSON, broken in this way."""
    line, row = line.rstrip(b"\n"), json.loads(line)
    if how in ("cut", "utf8", "nul"):
        at = rng.randrange(1, len(line) - 1)
        while how != "cut" and line[at] & 0xC0 == 0x80:  # not inside of a character
            at -= 1
        return line[:at] + {"cut": b"", "utf8": b"\xff" + line[at:], "nul": b"\0" + line[at:]}[how]
    if how in ("array", "text"):
        return json.dumps([row] if how == "array" else "row").encode()
    value = {"type": 7, "empty": "", "nul_escaped": "a\0b", "half": "a\ud83db"}.get(how)
    row = {k: v for k, v in row.items() if k != field} if how == "missing" else {**row, field: value}
    return json.dumps(row).encode()


def broken(kind: str, count: int, folder: Path, share: float = 0.01, seed: int = 0) -> dict[str, Any]:
    """Spoil a share of the rows of a file of JSON lines: whether the others come through and these are named."""
    rng = random.Random(f"{kind}/{seed}")
    path = folder / f"{kind}.broken.jsonl"
    records = list(random_records(count, seed))
    write_pairs(path, records, kind, problems=quiet)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = sorted(rng.sample(range(len(lines)), max(len(SPOILED), round(share * len(lines)))))
    for n, i in enumerate(bad):
        lines[i] = spoil(lines[i], SPOILED[n % len(SPOILED)], NEEDED[kind], rng) + b"\n"
    path.write_bytes(b"".join(lines))
    named: list[int] = []
    found = content(iter_pairs(path, problems=lambda p: None if p.kept else named.append(p.line)))
    good, row = [], 0
    for record in records:
        kept = [j for j in range(len(record.rejected)) if row + (0 if kind == "native" else j) not in bad]
        row += 1 if kind == "native" else len(record.rejected)
        if kept:
            for name, items in (("rejected", record.rejected), (EXTRA, record.provenance.get(EXTRA))):
                if items:
                    (vars(record) if name == "rejected" else record.provenance)[name] = [items[j] for j in kept]
            good.append(record)
    right = named == [i + 1 for i in bad]
    return {"kind": kind, "rows": len(lines), "spoiled": len(bad), "named": right, "others": found == content(good)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench formats", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--records", type=int, default=10_000, help="records of the chains and the broken files (10000)"
    )
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[1000, 10_000, 100_000], help="records (1000 10000 100000)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--bound", type=float, default=16.0, help="MiB that memory may grow (16)")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(arguments)
    from bench.measure import environment, table, write

    with tempfile.TemporaryDirectory() as folder:
        rows, lost = chains(args.records, Path(folder), args.kinds)
        print(table(rows, ("kind", "rows", "write", "read", "mib")), flush=True)
        print(f"{len(args.kinds) ** 2} chains of {args.records} records, {len(lost)} lose something {', '.join(lost)}")
        spoiled = [broken(k, args.records, Path(folder)) for k in args.kinds if k in NEEDED]
        print(table(spoiled, ("kind", "rows", "spoiled", "named", "others")))
    for row in rows:
        peaks = {str(n): memory(row["kind"], n) for n in args.memory}
        row |= {"peak_mib": peaks, "grown": max(peaks.values()) - min(peaks.values())}
        print(f"{row['kind']}: peak MiB by records {peaks}, grown {row['grown']:.1f}", flush=True)
    write(args.json, environment("cpu"), rows, lost=lost, broken=spoiled)
    grown = any(row["grown"] > args.bound for row in rows)
    return 1 if lost or grown or not all(row["named"] and row["others"] for row in spoiled) else 0
