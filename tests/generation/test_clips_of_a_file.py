"""Clips decoded together give the pixels of clips decoded one by one, from one pass over a real file."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from counter_clips import write_counter

from tempo_fast.config import GenerationConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import Request, make_engine
from tempo_fast.trees.vision import FeatureCache
from tempo_fast.video.reader import VideoReader


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    import av

    path = str(tmp_path_factory.mktemp("v") / "x.mp4")
    rng = np.random.default_rng(0)
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 72, 56, "yuv420p"
        stream.codec_context.gop_size = 12
        for _ in range(45):
            coarse = rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(8, 0).repeat(8, 1), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture
def reader(tiny):
    config = VideoConfig(backend="pyav", fps=5, min_frames=2, min_pixels=784, max_pixels=56 * 28)
    return VideoReader(config, tiny.geometry)


def plans_of(reader, file):
    return [
        reader.plan(file, [3, 9]),
        reader.plan_range(file, 20, 31),
        reader.plan(file, [40, 2, 40]),
        reader.plan(file),
    ]


def test_pixels_are_equal_and_decoded_once(reader, file, monkeypatch):
    plans = plans_of(reader, file)
    want = [reader.pixels(p) for p in plans]
    calls = []
    decode = reader.decoder.decode
    monkeypatch.setattr(reader.decoder, "decode", lambda path, indices: calls.append(indices) or decode(path, indices))
    assert all(map(torch.equal, reader.pixels_many(plans), want))
    assert len(calls) == 1 and len(set(calls[0])) == len(calls[0])


def test_the_engine_decodes_a_video_once(tiny, reader, file, monkeypatch):
    plans = plans_of(reader, file)
    requests = [Request((a, b), "Say it.") for a, b in zip(plans, plans[1:], strict=False)]
    config = GenerationConfig(max_new_tokens=6, batch_size=2)
    apart = [make_engine(config, tiny, reader, FeatureCache(), 0).generate([r])[0] for r in requests]
    calls = []
    decode = reader.decoder.decode
    monkeypatch.setattr(reader.decoder, "decode", lambda path, indices: calls.append(indices) or decode(path, indices))
    assert make_engine(config, tiny, reader, FeatureCache(), 0).generate(requests) == apart
    assert len(calls) == 1


def test_a_file_that_cannot_be_decoded_is_named(tiny, reader, file, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(open(file, "rb").read())
    plans = [reader.plan(str(bad), [1, 2]), reader.plan(str(bad), [30, 31])]
    data = bytearray(bad.read_bytes())
    data[64 : len(data) // 2] = b"\0" * (len(data) // 2 - 64)
    bad.write_bytes(bytes(data))
    engine = make_engine(GenerationConfig(max_new_tokens=4), tiny, reader, FeatureCache(), 0)
    with pytest.raises(InputError, match="bad.mp4"):
        engine.generate([Request((p,), "Say it.") for p in plans])


def test_a_file_that_changed_is_not_read_by_old_plans(tiny, reader, file, tmp_path):
    path = tmp_path / "c.mp4"
    path.write_bytes(open(file, "rb").read())
    plans = plans_of(reader, str(path))
    write_counter(path, 60, size=(56, 72))
    engine, features = GenerationConfig(max_new_tokens=4), FeatureCache()
    with pytest.raises(InputError, match=r"c\.mp4: the file has changed since it was planned"):
        make_engine(engine, tiny, reader, features, 0).generate([Request((p,), "Say it.") for p in plans])
    assert len(features) == 0


def test_frames_that_are_only_shown_black_are_not_decoded(reader, file, monkeypatch):
    plans = [reader.plan_clips(file, [(0, 10), (20, 30)], [False, True]), reader.plan(file, [3, 9])]
    want = [reader.pixels(p) for p in plans]
    calls = []
    decode = reader.decoder.decode
    monkeypatch.setattr(reader.decoder, "decode", lambda path, indices: calls.append(indices) or decode(path, indices))
    assert all(map(torch.equal, reader.pixels_many(plans), want))
    assert len(calls) == 1 and max(calls[0]) < 10
