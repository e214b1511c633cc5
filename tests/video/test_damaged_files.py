"""More than 500 damaged files: one error each that names the file, or the right frames; no crash, no hang, no leak."""

from __future__ import annotations

import json
import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import damage
import pytest

import tempo_fast
from tempo_fast.video.decode import BACKENDS, available_backends

# seconds for one file in the process that reads; it takes some hundredths
PATIENCE = 60.0
WARM_UP = 150


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What undamaged packets hold, by source; and (path, source) of every file, in a drawn order."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "whole").mkdir()
    sources = {name: damage.write_source(folder / "whole" / name) for name in damage.SOURCES}
    names = list(sources)
    made = [(str(path), name) for name, path in sources.items()]
    for k, name in enumerate(names):
        other = sources[names[(k + 4) % len(names)]].read_bytes()
        for i, (kind, data) in enumerate(damage.damages(sources[name].read_bytes(), other, random.Random(name))):
            path = folder / f"{i:02d} {kind} {name}"
            path.write_bytes(data)
            made.append((str(path), name))
    for file_name, data in damage.not_videos(sources[names[0]].read_bytes(), random.Random(0)):
        (folder / file_name).write_bytes(data)
        made.append((str(folder / file_name), ""))
    random.Random(1).shuffle(made)
    return {name: damage.told_packets(path) for name, path in sources.items()}, made


def rows_of(backend: str, told: dict[str, Any], made: list[tuple[str, str]], folder: Path) -> Iterator[dict[str, Any]]:
    """One row per file, from a process of its own that is not waited for longer than it may take."""
    manifest = folder / f"{backend}.json"
    manifest.write_text(json.dumps({"backend": backend, "timeout_s": PATIENCE / 2, "told": told, "files": made}))
    root = Path(tempo_fast.__file__).parents[1]
    python_path = os.pathsep.join([str(root), str(root / "kernels"), str(root / "tests"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    with open(folder / f"{backend}.err", "w+b") as errors, subprocess.Popen(
        [sys.executable, damage.__file__, str(manifest)], stdout=subprocess.PIPE, stderr=errors, text=True,
        env=environment,
    ) as process:  # fmt: skip

        def pump() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=pump, daemon=True).start()
        try:
            for path, _ in made:
                try:
                    line = lines.get(timeout=PATIENCE)
                except queue.Empty:
                    pytest.fail(f"{path}: hangs")
                if not line:
                    errors.seek(0)
                    pytest.fail(f"{path}: ends the process ({process.wait()}): {errors.read()[-2000:].decode()}")
                yield json.loads(line)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "dali-gpu"])
def test_every_damaged_file_is_named_or_right(backend, files, tmp_path, record_property):
    missing = available_backends()[backend]
    if missing:
        pytest.skip(f"{backend}: {missing}")
    told, made = files
    rows = list(rows_of(backend, told, made, tmp_path))
    assert len(rows) == len(made) > 500 and [r["path"] for r in rows] == [path for path, _ in made]
    failed = {r["path"]: r["error"] for r in rows if "error" in r}
    decoded = {r["path"]: r for r in rows if "error" not in r}
    for path, error in failed.items():
        assert error.startswith(f"{path}: ") and error.isprintable(), error

    whole = [path for path, _ in made if Path(path).parent.name == "whole"]
    for path in whole if backend == "pyav" else []:
        assert decoded[path]["right"] + decoded[path]["unknown"] == damage.N and not decoded[path]["unreadable"]
    assert {path for path, source in made if not source} - set(failed) <= {p for p, _ in made if "renamed" in p}

    for fault in ("wrong", "moved"):
        assert not {path: r[fault] for path, r in decoded.items() if r[fault]}, fault
    # VP8, VP9 and MPEG-4 have no checks: nobody sees an older picture in place of a damaged one; it has to be rare
    stale = sum(len(r["stale"]) for r in decoded.values())
    assert stale <= 0.003 * sum(r["right"] for r in decoded.values())
    # pieces that are there twice come twice
    twice = ("twice", "spliced")
    assert not {p: r["disordered"] for p, r in decoded.items() if r["disordered"] and not any(t in p for t in twice)}

    memory = [r["rss"] / 2**20 for r in rows]
    growth = max(memory[WARM_UP:]) - max(memory[:WARM_UP])
    assert growth < 50, f"{growth:.0f} MiB more than after the first {WARM_UP} files"
    figures = {
        "files": len(made), "refused": len(failed), "decoded": len(decoded),
        "frames right": sum(r["right"] for r in decoded.values()),
        "frames of unknown number": sum(r["unknown"] for r in decoded.values()),
        "damaged pictures": sum(r["unreadable"] for r in decoded.values()),
        "older pictures behind damage": stale,
        "growth in MiB": round(growth, 1),
    }  # fmt: skip
    record_property("damaged files", figures)
    print(backend, figures, {p: r["stale"] for p, r in decoded.items() if r["stale"]})
