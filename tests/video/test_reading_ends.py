"""Reading ends at its deadline, a failing disk is a DecodeError, and another content is seen to be another."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import av
import pytest
from counter_clips import read_counter, write_counter

from tempo_fast import files as files_module
from tempo_fast.config import VideoConfig
from tempo_fast.video import container as container_module
from tempo_fast.video import decode_pyav
from tempo_fast.video import probe as probe_module
from tempo_fast.video.container import Deadline, DecodeError, DecodeTimeout, open_video
from tempo_fast.video.decode import open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.decoder import one_by_one
from tempo_fast.video.probe import content_digest, probe
from tempo_fast.video.reader import VideoReader


@pytest.fixture
def reader(geometry):
    return VideoReader(VideoConfig(backend="pyav", fps=5.0), geometry)


def test_decoding_ends_at_its_deadline(plain):
    probe(plain)
    slow = open_decoder("pyav", timeout_s=0.0)
    with pytest.raises(DecodeTimeout, match=r"plain\.mp4: reading it took longer than 0 s"):
        slow.decode(plain, [50])
    assert read_counter(open_decoder("pyav", timeout_s=60.0).decode(plain, [50])) == [50]
    first, second = one_by_one(slow, [(plain, [3]), (plain, [99])])
    assert "took longer" in str(first) and "frame 99 does not exist" in str(second)
    with pytest.raises(DecodeTimeout, match=r"plain\.mp4: reading it took longer than 0 s"):
        next(PyAVDecoder().iterate(probe(plain), [50], Deadline(0.0)))


def test_the_deadline_is_seen_while_no_frame_comes_out(plain, monkeypatch):
    class Mute:
        """A container whose packets take their time and hold nothing."""

        def __init__(self, container: Any) -> None:
            self.seek, self.container = container.seek, container

        def demux(self, stream: Any) -> Any:
            for packet in self.container.demux(stream):
                time.sleep(0.05)
                yield SimpleNamespace(pts=packet.pts, decode=list)

    @contextmanager
    def mute(path: Any) -> Any:
        with open_video(path) as (container, stream):
            yield Mute(container), stream

    probe(plain)
    monkeypatch.setattr(decode_pyav, "open_video", mute)
    begin = time.monotonic()
    with pytest.raises(DecodeTimeout):
        PyAVDecoder(timeout_s=0.2).decode(plain, [50])
    assert time.monotonic() - begin < 2


def test_the_probe_ends_at_its_deadline_too(plain, tmp_path, reader):
    slow = Deadline(0.0)
    for k, path in enumerate((plain, write_counter(tmp_path / "c.avi", 20, codec="mjpeg", pix_fmt="yuvj420p"))):
        name = tmp_path / f"{k}{path.suffix}"
        name.write_bytes(path.read_bytes())
        with pytest.raises(DecodeTimeout, match=rf"{name.name}: reading it took longer than 0 s"):
            probe(name, slow)
        info = probe(name)
        assert probe(name, slow) is info  # what is known costs no time
        probe_module._probe.cache_clear()
        with pytest.raises(DecodeTimeout):
            PyAVDecoder(timeout_s=0.0).decode(name, [0])
    plan = reader.plan(plain)
    reader.timeout_s = 0.0
    probe_module._probe.cache_clear()
    (late,) = reader.frames_many([plan])
    assert isinstance(late, DecodeTimeout)


def test_a_disk_that_fails_is_a_decode_error(plain, tmp_path, reader, monkeypatch):
    def fails(*args: Any) -> Any:
        raise OSError(5, os.strerror(5))

    webm = write_counter(tmp_path / "w.webm", 20, codec="libvpx-vp9")
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(plain.read_bytes())
    plan, other = reader.plan(copy), reader.plan(plain, [7])
    with monkeypatch.context() as broken:
        broken.setattr(container_module, "gap", fails)
        with pytest.raises(DecodeError, match=r"w\.webm: cannot be read \(Input/output error\)"):
            probe(webm)
    open_file = open

    def unreadable(path: Any, *args: Any, **options: Any) -> Any:
        return fails() if str(path) == str(copy) else open_file(path, *args, **options)

    monkeypatch.setattr(files_module, "open", unreadable, raising=False)
    probe_module._probe.cache_clear()
    probe_module._content_digest.cache_clear()
    with pytest.raises(DecodeError, match=r"copy\.mp4: cannot be read \(Input/output error\)"):
        content_digest(copy)
    bad, good = reader.frames_many([plan, other])
    assert isinstance(bad, DecodeError) and read_counter(good) == [7]


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_what_tells_one_content_from_another(tmp_path, place):
    """At the same size and time both ends do; what lies between them needs another time."""
    path = write_counter(tmp_path / "c.mp4", 20)
    with av.open(str(path)) as file:
        packet = [p.pos for p in file.demux(video=0)][15]
    small, free = path.read_bytes(), 1 << 17
    path.write_bytes(small + (8 + free).to_bytes(4, "big") + b"free" + bytes(free))
    before, stat = probe(path), os.stat(path)
    at = {"start": packet + 8, "middle": len(small) + free // 2, "end": -1}[place]
    assert packet < 1 << 15
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (probe(path) is before) == (place == "middle")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = probe(path)
    assert after.digest == content_digest(path) == files_module.file_digest(path) != before.digest


def test_a_file_is_hashed_once(tmp_path, monkeypatch):
    hashed: list[str] = []
    whole = probe_module.file_digest
    monkeypatch.setattr(probe_module, "file_digest", lambda path: hashed.append(str(path)) or whole(path))
    path = write_counter(tmp_path / "h.mp4", 20)
    info = probe(path)
    probe_module._probe.cache_clear()
    assert probe(path) == info and content_digest(path) == info.digest == whole(path)
    assert hashed == [str(path)]


@pytest.mark.timeout(60)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DecodeError, match="pipe.mp4: is a pipe or a device"):
        probe(tmp_path / "pipe.mp4")
