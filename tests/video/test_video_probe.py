"""What a file holds, and one sentence that names the file when it holds no video."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tempo_fast.errors import InputError
from tempo_fast.files import file_digest
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import DecodeError, probe


def test_plain_facts(plain):
    info = probe(plain)
    assert (info.n_frames, info.fps, info.width, info.height) == (60, 30.0, 192, 64)
    assert info.duration_s == pytest.approx(2.0, abs=1e-6)
    assert np.allclose(info.pts_s, np.arange(60) / 30, atol=1e-6)
    assert (info.codec, info.rotation, info.mirrored, info.has_audio, info.vfr, info.has_edit_list) == (
        "h264", 0, False, False, False, False,
    )  # fmt: skip
    assert info.indexed and info.keyframes[:2] == (0, 12)
    assert info.digest == file_digest(plain)


def test_variable_rate_and_audio(tmp_path, counter):
    gaps = np.random.default_rng(1).integers(10, 50, 39)
    pts = [0, *np.cumsum(gaps).tolist()]
    info = probe(counter.write(tmp_path / "v.mp4", 40, pts=pts))
    assert info.vfr and np.allclose(info.pts_s, np.array(pts) / 600, atol=1e-6)
    assert info.fps == pytest.approx(40 / info.duration_s)
    sound = probe(counter.write(tmp_path / "s.mp4", 40, audio=True))
    assert sound.has_audio and sound.n_frames == 40 and not sound.vfr


def test_millisecond_timestamps_keep_the_rate(tmp_path, counter):
    """Matroska rounds times to milliseconds; 30 fps must not become 29.99 or 30.01, where sampling rules floor."""
    for n in (30, 31, 47, 59):
        info = probe(counter.write(tmp_path / f"{n}.mkv", n))
        assert info.fps == 30.0 and not info.vfr


def _moov_first(path: Path, out: Path) -> Path:
    import av

    with av.open(str(path)) as source, av.open(str(out), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out


def _flip(webm: bytes, after: int) -> bytes:
    """Change what kind of element the next block of a known size is."""
    import re

    block = re.compile(rb"\xa3[\x40-\x7f].\x81", re.DOTALL).search(webm, after)
    assert block is not None
    return webm[: block.start()] + b"\xb3" + webm[block.start() + 1 :]


def _bad_files(tmp_path: Path, counter, plain: Path) -> dict[str, tuple[Path, str]]:
    import av

    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    whole = plain.read_bytes()
    first = _moov_first(plain, tmp_path / "first.mp4").read_bytes()
    webm = counter.write(tmp_path / "whole.webm", 60, codec="libvpx-vp9").read_bytes()
    avi = counter.write(tmp_path / "whole.avi", 60, codec="mjpeg", pix_fmt="yuvj420p").read_bytes()
    silent = tmp_path / "sound.m4a"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("aac", rate=22050, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 22050, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return {
        "missing": (tmp_path / "none.mp4", "no such file"),
        "folder": (tmp_path, "is a folder"),
        "empty": (write("empty.mp4", b""), "is empty"),
        "text": (write("text.mp4", b"not a film, only words\n" * 50), "cannot be decoded"),
        "text_suffix": (write("words.txt", b"not a film, only words\n" * 50), "cannot be decoded|has no video"),
        "noise": (write("noise.mp4", np.random.default_rng(0).bytes(5000)), "cannot be decoded"),
        "no_index": (write("tail.mp4", whole[: len(whole) // 2]), "is truncated"),
        "cut": (write("cut.mp4", first[: len(first) * 2 // 3]), "is truncated"),
        "cut_by_one": (write("one.mp4", first[:-1]), "is truncated"),
        "cut_webm": (write("cut.webm", webm[: len(webm) // 2]), "is truncated"),
        "cut_avi": (write("cut.avi", avi[: len(avi) // 2]), "is truncated"),
        "magic_only": (write("magic.webm", webm[:4]), "cannot be decoded"),
        "lost_block": (write("lost.webm", _flip(webm, 7 * len(webm) // 10)), "is damaged"),
        "list": (write("list.mp4", b"ffconcat version 1.0\nfile whole.webm\n"), "is a list of other files"),
        "audio_only": (silent, "has no video stream"),
        "header_only": (write("head.mp4", first[:100]), "is truncated"),
    }


def test_bad_files_give_one_sentence_that_names_them(tmp_path, counter, plain):
    for name, (path, words) in _bad_files(tmp_path, counter, plain).items():
        for act in (probe, lambda p: PyAVDecoder().decode(p, [0])):
            with pytest.raises(DecodeError, match=words) as caught:
                act(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and "\n" not in message, name
            assert isinstance(caught.value, InputError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path, plain):
    path = tmp_path / "locked.mp4"
    path.write_bytes(plain.read_bytes())
    path.chmod(0)
    with pytest.raises(DecodeError, match="locked.mp4: cannot be read"):
        probe(path)


@pytest.mark.parametrize("name", ["clip:01 100% #1 é.mp4", "a%03d.mp4", "http:x.mp4", "-i.mp4", "file:x.mp4"])
def test_any_name_will_do(name, tmp_path, plain, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(plain.read_bytes())
    assert probe(name).n_frames == 60 and PyAVDecoder().decode(name, [59]).shape == (1, 64, 192, 3)


def test_probe_is_cached_until_the_file_changes(tmp_path, counter):
    path = counter.write(tmp_path / "c.mp4", 20)
    first = probe(path)
    assert probe(str(path)) is first
    counter.write(path, 25)
    os.utime(path, ns=(1, 1))
    assert probe(path).n_frames == 25
