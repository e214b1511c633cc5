"""Files that a decoder gets wrong go to PyAV, under its name; batches keep failures apart; one decode for all plans."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from counter_clips import hide_first, read_counter, turned, upright, write_counter

from tempo_fast.config import VideoConfig
from tempo_fast.video import decode as decode_module
from tempo_fast.video import decoder as decoder_module
from tempo_fast.video.container import DecodeError
from tempo_fast.video.decode import available_backends, decoder_for, open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.packets import Packet, dense_keyframes, read_packet
from tempo_fast.video.probe import probe
from tempo_fast.video.reader import VideoReader

DALI = pytest.mark.skipif(bool(available_backends()["dali-cpu"]), reason="needs DALI")


class Picky(PyAVDecoder):
    """A decoder of another name that refuses edit lists."""

    name = route = "picky"

    def refuses(self, info: Any) -> str:
        return "picky counts what an edit list hides" if info.has_edit_list else ""


@pytest.fixture
def cut(tmp_path) -> Path:
    return hide_first(write_counter(tmp_path / "cut.mp4", 40, bframes=2), 5)


@pytest.fixture
def reader(geometry):
    reader = VideoReader(VideoConfig(backend="pyav", fps=5.0), geometry)
    reader.decoder = Picky()
    return reader


def test_the_plan_names_the_decoder_that_reads_the_file(reader, cut, plain, caplog):
    decode_module._announce_other.cache_clear()
    with caplog.at_level(logging.WARNING, logger="tempo_fast.video.decode"):
        plans = [reader.plan(cut), reader.plan(cut, [3, 1]), reader.plan(plain)]
        frames = reader.frames_many(plans)
    said = [r.message for r in caplog.records]
    assert said == ["video.backend picky: picky counts what an edit list hides; such files are decoded by pyav"]
    assert ["decoder=pyav;color=pyav/swscale:" in p.rule for p in plans] == [True, True, False]
    assert "decoder=picky;color=picky:" in plans[2].rule
    for plan, got, hidden in zip(plans, frames, (5, 5, 0), strict=True):
        assert read_counter(got) == [i + hidden for i in plan.indices]
    reader.decoder = PyAVDecoder()
    assert reader.plan(cut).key == plans[0].key and reader.plan(plain).key != plans[2].key


def test_plans_of_a_file_share_one_decode(geometry, tmp_path, plain, monkeypatch):
    reader = VideoReader(VideoConfig(backend="pyav", fps=6.0), geometry)
    other = write_counter(tmp_path / "other.mp4", 30)
    plans = [reader.plan(plain), reader.plan_clips(plain, [(40, 60), (0, 20)])]
    plans += [reader.plan(other), reader.plan(plain, [7, 7])]
    seen: list[tuple[str, list[int]]] = []
    decode = PyAVDecoder.decode

    def spy(self, path, indices):
        seen.append((str(path), list(indices)))
        return decode(self, path, indices)

    monkeypatch.setattr(PyAVDecoder, "decode", spy)
    together = reader.frames_many(plans)
    assert [path for path, _ in seen] == [str(plain), str(other)]
    assert seen[0][1] == sorted({i for k in (0, 1, 3) for i in plans[k].indices})
    for plan, frames in zip(plans, together, strict=True):
        assert torch.equal(frames, reader.frames(plan)) and read_counter(frames) == list(plan.indices)


def test_a_failure_is_a_value_in_its_place(reader, plain, tmp_path):
    gone, changed = tmp_path / "gone.mp4", tmp_path / "changed.mp4"
    for path in (gone, changed):
        path.write_bytes(plain.read_bytes())
    plans = [reader.plan(plain, [4]), reader.plan(gone, [1]), reader.plan(changed), reader.plan(changed, [2])]
    gone.unlink()
    write_counter(changed, 20)
    good, *bad = reader.frames_many(plans)
    assert read_counter(good) == [4]
    for error, words in zip(bad, ("gone.mp4: no such file", *["changed.mp4: the file has changed"] * 2), strict=True):
        assert isinstance(error, DecodeError) and words in str(error)
    with pytest.raises(DecodeError, match="gone.mp4: no such file"):
        reader.frames(plans[1])


def test_pixels_of_many_plans_are_those_of_each(reader, plain, cut, tmp_path, monkeypatch):
    gone = tmp_path / "gone.mp4"
    gone.write_bytes(plain.read_bytes())
    blank = reader.plan_clips(plain, [(0, 20), (40, 60), (20, 40)], [False, True, False])
    plans = [reader.plan(plain), blank, reader.plan(cut), reader.plan(gone), reader.plan(cut, [7, 3, 7])]
    want = [reader.pixels(plan) for plan in plans]
    gone.unlink()
    seen: list[tuple[str, list[int]]] = []
    decode = PyAVDecoder.decode

    def spy(self, path, indices):
        seen.append((str(path), list(indices)))
        return decode(self, path, indices)

    monkeypatch.setattr(PyAVDecoder, "decode", spy)
    got = reader.pixels_many(plans)
    assert sorted(path for path, _ in seen) == sorted([str(plain), str(cut)])
    hidden = set(blank.indices[i] for i, dark in enumerate(blank.blank) if dark) - set(plans[0].indices)
    assert hidden and not hidden & set(dict(seen)[str(plain)])
    assert isinstance(got.pop(3), DecodeError) and want.pop(3) is not None
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_frames_of_many_files_are_not_all_held_at_once(reader, plain, tmp_path, monkeypatch):
    plans = []
    for k in range(5):
        (tmp_path / f"{k}.mp4").write_bytes(plain.read_bytes())
        plans.append(reader.plan(tmp_path / f"{k}.mp4", [4, 40]))
    monkeypatch.setattr(decoder_module, "MOST_BYTES", 2 * 2 * 64 * 192 * 3)
    sizes: list[int] = []
    decode_many = reader.decoder.decode_many
    monkeypatch.setattr(reader.decoder, "decode_many", lambda items: sizes.append(len(items)) or decode_many(items))
    assert all(isinstance(x, torch.Tensor) for x in reader.pixels_many(plans))
    assert sizes == [2, 2, 1]


def test_pixels_in_another_dtype(geometry, plain):
    reader = VideoReader(VideoConfig(backend="pyav", fps=2.0), geometry)
    plan = reader.plan(plain)
    assert torch.equal(reader.pixels(plan, torch.bfloat16), reader.pixels(plan).to(torch.bfloat16))


def test_what_the_probe_tells_of_the_stream(tmp_path):
    path = write_counter(
        tmp_path / "c.mp4", 20, bframes=2,
        options={"profile": "main", "x264-params": "colorprim=bt709:transfer=bt709:colormatrix=bt709:fullrange=off"},
    )  # fmt: skip
    info = probe(path)
    assert (info.profile, info.pix_fmt, info.interlaced, info.video_streams) == ("Main", "yuv420p", False, 1)
    assert (info.color_space, info.color_primaries, info.color_transfer, info.color_range) == (
        "bt709", "bt709", "bt709", "limited",
    )  # fmt: skip
    plain = probe(write_counter(tmp_path / "p.webm", 20, codec="libvpx-vp9"))
    assert (plain.color_primaries, plain.color_transfer) == ("unspecified", "unspecified")


def test_what_packets_tell_without_decoding(tmp_path):
    def info(name: str, **arguments: Any) -> Any:
        return probe(write_counter(tmp_path / name, 40, **arguments))

    x265 = {"codec": "libx265", "bframes": 3}
    params = "log-level=none:bframes=3:keyint=12:min-keyint=12:open-gop="
    assert info("open.mp4", **x265, options={"x265-params": params + "1"}).open_gop
    assert not info("closed.mp4", **x265, options={"x265-params": params + "0"}).open_gop
    again, coded = info("again.mp4", codec="libsvtav1"), info("coded.mp4", codec="libvpx-vp9")
    assert again.shows_again and again.indexed and not coded.shows_again
    assert info("seen.webm", codec="libvpx").indexed
    assert not info("apart.mp4", bframes=2, gop=12).dense_keyframes
    # a picture coded at 3 and shown at 5; a keyframe coded at 4
    key = Packet(5, 3, 1, 9, True, False, True, True)
    assert dense_keyframes([key, key._replace(pts=6, dts=4)])
    assert not dense_keyframes([key, key._replace(pts=8, dts=6)])


def test_vp8_pictures_that_only_serve_as_references_are_no_frames(tmp_path):
    path = write_counter(tmp_path / "v.webm", 30, codec="libvpx")
    with av.open(str(path)) as file:
        coded = [bytes(p) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    data[data.index(coded[7])] &= ~0x10  # show_frame
    path.write_bytes(data)
    info = probe(path)
    assert (info.n_frames, info.indexed) == (29, False)
    assert read_counter(PyAVDecoder().decode(path, range(29))) == [*range(7), *range(8, 30)]
    for backend in ("dali-cpu", "torchcodec"):
        if not available_backends()[backend]:
            assert "one shown frame each" in open_decoder(backend).refuses(info)


@pytest.mark.parametrize(("head", "again"), [(0x88, True), (0x80, False), (0xB4, True), (0xB8, False), (0x82, False)])
def test_vp9_headers_that_show_a_frame_again(head, again):
    """Marker 10, profile 0 or 3 (which has one more bit), then the bit."""

    class Whole(bytearray):
        size, pts, dts, duration, is_keyframe, is_discard = 1, 0, 0, 1, False, False

    assert read_packet("vp9", Whole([head])).coded is not again


@DALI
def test_dali_keeps_the_files_of_a_batch_apart(tmp_path):
    """Eleven files are two runs; three of them are no good in three ways, one of which only shows while decoding."""
    paths = [write_counter(tmp_path / f"{k}.webm", 20 + k, codec="libvpx-vp9", gop=50) for k in range(10)]
    broken = bytearray(paths[4].read_bytes())
    packets = _packet_places(paths[4])
    at, size = packets[8]
    broken[at + 12 : at + 12 + size // 2] = bytes(size // 2)
    paths[4].write_bytes(broken)
    paths.append(write_counter(tmp_path / "h264.mp4", 20))
    items = [(path, [19, 2, 2]) for path in paths]
    items[7] = (paths[7], [0, 99])
    decoder = open_decoder("dali-cpu")
    out = decoder.decode_many(items)
    assert [k for k, x in enumerate(out) if isinstance(x, DecodeError)] == [4, 7, 10]
    assert "4.webm: " in str(out[4]) and "frame 99 does not exist" in str(out[7])
    assert "dali-cpu reads VP8, VP9 and MJPEG only, not h264" in str(out[10])
    for k in (0, 1, 2, 3, 5, 6, 8, 9):
        assert read_counter(out[k]) == [19, 2, 2]


def _packet_places(path: Path) -> list[tuple[int, int]]:
    with av.open(str(path)) as file:
        return [(p.pos, p.size) for p in file.demux(video=0) if p.size]


@DALI
@pytest.mark.parametrize("name", ["clockwise", "half", "counterclockwise", "mirrored", "upside_down"])
def test_dali_leaves_pictures_as_stored_and_we_turn_them(name, tmp_path):
    path = write_counter(tmp_path / "t.webm", 20, codec="libvpx-vp9", **turned(name))
    frames = open_decoder("dali-cpu").decode(path, [19, 4, 4, 0])
    assert read_counter(frames) == [19, 4, 4, 0] and upright(frames) and frames.is_contiguous()


@DALI
def test_what_dali_gpu_refuses(tmp_path):
    """By its source, which is all that is known of it: it has not been run."""
    from tempo_fast.video.decode_dali import DaliDecoder

    decoder = DaliDecoder(gpu=True, device=torch.device("cuda", 0))
    open_gop = "log-level=none:bframes=3:keyint=12:min-keyint=12:open-gop=1"
    clips: dict[str, tuple[str, dict[str, Any]]] = {
        "a.mp4": ("", {}),
        "b.mp4": ("", {"bframes": 2}),
        "c.mp4": ("", {"codec": "libx265"}),
        "d.webm": ("", {"codec": "libvpx-vp9"}),
        "e.mp4": ("8 bits, 4:2:0 and even sides", {"size": (65, 195), "pix_fmt": "yuv444p"}),
        "f.webm": ("8 bits, 4:2:0 and even sides", {"codec": "libvpx-vp9", "size": (65, 195)}),
        "g.mp4": ("may miscount av1", {"codec": "libsvtav1"}),
        "h.mp4": ("may miscount hevc", {"codec": "libx265", "bframes": 3, "options": {"x265-params": open_gop}}),
        "i.mp4": ("is not trusted with mpeg4", {"codec": "mpeg4"}),
    }
    for file_name, (words, arguments) in clips.items():
        why = decoder.refuses(probe(write_counter(tmp_path / file_name, 40, **arguments)))
        assert words in why and bool(words) == bool(why), (file_name, why)
    cut = hide_first(write_counter(tmp_path / "cut.mp4", 30), 3)
    assert "edit list" in decoder.refuses(probe(cut))
    assert decoder_for(decoder, probe(cut)).name == "pyav"


@DALI
def test_a_pipeline_on_the_gpu_runs_again_when_its_frames_are_copied(plain, monkeypatch):
    """With a pipeline that shows what is done to it: the copy's stream is waited for while no other run can begin."""
    from tempo_fast.video.decode_dali import DaliDecoder

    decoder, buffer = DaliDecoder(gpu=True, device=torch.device("cuda")), np.zeros((2, 64, 192, 3), np.uint8)
    pipe = SimpleNamespace(feed_input=lambda *a: None, run=lambda: ([buffer],))
    monkeypatch.setattr(decoder, "_built", lambda: pipe)
    waited: list[tuple[bool, bool]] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append((decoder._lock.locked(), decoder._pipeline is None)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    frames = decoder.decode(plain, [7, 3])
    buffer[:] = 1
    assert waited == [(True, True)] and not frames.any() and decoder._pipeline is pipe


@DALI
@pytest.mark.parametrize(("gpu", "device", "used"), [(True, "cuda", 3), (True, "cuda:1", 1), (False, "cpu", None)])
def test_dali_uses_the_device_asked_for_or_that_of_the_thread(gpu, device, used, monkeypatch):
    from tempo_fast.video.decode_dali import DaliDecoder

    decoder, seen = DaliDecoder(gpu=gpu, device=torch.device(device)), []

    def pipeline(**options: Any) -> Any:
        seen.append(options["device_id"])
        raise RuntimeError("this is as far as it goes")

    monkeypatch.setattr(decoder, "_pipeline_class", pipeline)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(RuntimeError, match="as far as"):
        decoder._built()
    assert seen == [used]


def test_of_several_video_streams_the_first_is_read_by_pyav(tmp_path):
    path, n = tmp_path / "two.mkv", 12
    one, other = write_counter(tmp_path / "1.mp4", n), write_counter(tmp_path / "2.mp4", n, number=lambda i: 100 + i)
    with av.open(str(path), "w") as target:
        sources = [av.open(str(x)) for x in (one, other)]
        streams = [target.add_stream_from_template(s.streams.video[0]) for s in sources]
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
            source.close()
    info = probe(path)
    assert (info.video_streams, info.n_frames) == (2, n)
    assert read_counter(PyAVDecoder().decode(path, [n - 1, 0])) == [n - 1, 0]
    for backend in ("dali-cpu", "torchcodec"):
        if not available_backends()[backend]:
            assert "several video streams" in open_decoder(backend).refuses(info)


@pytest.mark.parametrize("backend", ["pyav", "torchcodec", "dali-cpu"])
def test_a_decoder_serves_several_threads(backend, tmp_path):
    missing = available_backends()[backend]
    if missing:
        pytest.skip(f"{backend}: {missing}")
    paths = [write_counter(tmp_path / f"{k}.webm", 24 + k, codec="libvpx-vp9") for k in range(4)]
    (tmp_path / "bad.webm").write_bytes(paths[0].read_bytes()[:-900])
    decoder = open_decoder(backend)

    def work(k: int) -> list[int]:
        if k % 5 == 4:
            with pytest.raises(DecodeError, match="bad.webm"):
                decoder.decode(tmp_path / "bad.webm", [0])
            return []
        return read_counter(decoder.decode(paths[k % 5], [23, k % 20, 0]))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(20))) == [[] if k % 5 == 4 else [23, k % 20, 0] for k in range(20)]
