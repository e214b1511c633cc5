"""Visual features: cached by pixels and by the tower's state, encoded without graph or with one."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from counter_clips import write_counter

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.trees.feature_store import FeatureStore
from tempo_fast.trees.vision import FeatureCache, encode_pixels, prepare_pixels
from tempo_fast.video.reader import VideoReader


def encode(bundle: Any, reader: Any, plans: list[Any], dtype: torch.dtype = torch.float32) -> Any:
    """One call with the graph of the tower's parameters."""
    return encode_pixels(bundle.family, bundle.model, prepare_pixels(reader, plans, "cpu", dtype))


def cached(bundle: Any, cache: FeatureCache, reader: Any, plans: list[Any], **more: Any) -> Any:
    return cache.features(bundle.family, bundle.model, reader, plans, **more)


def test_a_video_is_decoded_and_encoded_once(tiny: Any, reader: Any, make_plan: Any) -> None:
    a, b = make_plan("a", 3), make_plan("b", 2, 56, 28)
    cache = FeatureCache()
    first = cached(tiny, cache, reader, [a, b, a])
    assert first.shape == (2 + 2 + 2, 64) and not first.requires_grad
    assert torch.equal(first[:2], first[4:])
    assert (cache.hits, cache.misses, len(reader.calls)) == (0, 2, 2)
    again = cached(tiny, cache, reader, [b, make_plan("a", 3)])
    assert torch.equal(again, torch.cat([first[2:4], first[:2]]))
    assert (cache.hits, cache.misses, len(reader.calls)) == (2, 2, 2)
    assert cached(tiny, cache, reader, []) is None


@pytest.mark.parametrize("together", [False, True])
def test_features_are_those_of_one_video_alone(tiny: Any, reader: Any, make_plan: Any, together: bool) -> None:
    plans = [make_plan("a", 5), make_plan("b", 1, 56, 56), make_plan("c", 4, 28, 84)]
    features = cached(tiny, FeatureCache(), reader, plans, together=together)
    alone = torch.cat([encode(tiny, reader, [p]) for p in plans])
    torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encode(tiny, reader, plans), alone, rtol=1e-5, atol=1e-5)


def test_the_least_recently_used_goes_first(tiny: Any, reader: Any, make_plan: Any) -> None:
    a, b, c = (make_plan(x, 2) for x in "abc")
    size = 64 * 4  # one token each
    cache = FeatureCache(max_bytes=2 * size)
    cached(tiny, cache, reader, [a])
    cached(tiny, cache, reader, [b])
    cached(tiny, cache, reader, [a])
    cached(tiny, cache, reader, [c])  # b goes
    assert len(cache) == 2 and cache.n_bytes == 2 * size
    reader.calls.clear()
    cached(tiny, cache, reader, [a, c])
    assert reader.calls == []
    cached(tiny, cache, reader, [b])
    assert reader.calls == [b.key]
    # larger than the cache: served, not kept
    small = FeatureCache(max_bytes=size - 1)
    assert cached(tiny, small, reader, [a]).shape == (1, 64) and len(small) == 0 and small.n_bytes == 0
    cache.clear()
    assert (len(cache), cache.n_bytes) == (0, 0)


def test_a_changed_tower_makes_new_features(tiny: Any, lora: Any, reader: Any, make_plan: Any) -> None:
    bundle, cache, plans = lora(tiny, vision=True), FeatureCache(), [make_plan("a", 2)]
    on = cached(bundle, cache, reader, plans)
    with bundle.model.disable_adapter():
        off = cached(bundle, cache, reader, plans)
    torch.testing.assert_close(off, cached(tiny, FeatureCache(), reader, plans), rtol=0, atol=0)
    assert not torch.allclose(on, off, atol=1e-3) and cache.misses == 2
    assert torch.equal(cached(bundle, cache, reader, plans), on) and cache.hits == 1
    weight = next(p for n, p in bundle.model.named_parameters() if "visual" in n and "lora_B" in n)
    with torch.no_grad():
        weight.mul_(2)  # an optimizer step
    moved = cached(bundle, cache, reader, plans)
    assert not torch.equal(moved, on)
    merged = bundle.model.merge_and_unload()
    torch.testing.assert_close(cache.features(bundle.family, merged, reader, plans), moved, rtol=1e-4, atol=1e-4)
    assert cache.misses == 4


def test_grad_reaches_the_tower_and_repeats_share_one_call(tiny: Any, lora: Any, reader: Any, make_plan: Any) -> None:
    bundle = lora(tiny, vision=True)
    a, b = make_plan("a", 3), make_plan("b", 2)
    calls: list[int] = []
    vision = bundle.family.vision_tower(bundle.model)
    vision.register_forward_hook(lambda *_: calls.append(1))
    features = encode(bundle, reader, [a, b, a])
    assert features.requires_grad and len(reader.calls) == 2 and len(calls) == 1
    assert torch.equal(features[:2], features[-2:])
    features[-2:].sum().backward()  # through the repeat of a
    assert any(p.grad is not None and p.grad.abs().sum() > 0
               for n, p in bundle.model.named_parameters() if "visual" in n)  # fmt: skip
    with torch.no_grad():
        separate = torch.cat([encode(bundle, reader, [p]) for p in (a, b, a)])
    torch.testing.assert_close(features, separate, rtol=1e-5, atol=1e-5)


def test_prepared_pixels_hold_each_video_once(reader: Any, make_plan: Any) -> None:
    a, b = make_plan("a", 3), make_plan("b", 2, 56, 28)
    prepared = prepare_pixels(reader, [b, a, make_plan("b", 2, 56, 28)], "cpu", torch.bfloat16)
    assert prepared is not None and prepared.order == [0, 1, 0] and len(reader.calls) == 2
    assert prepared.grids == [b.grid, a.grid] and prepared.pixels.dtype == torch.bfloat16
    want = torch.cat([reader.pixels(b), reader.pixels(a)]).bfloat16()
    assert torch.equal(prepared.pixels, want)
    assert prepare_pixels(reader, [], "cpu", torch.float32) is None


def test_a_reader_decodes_a_file_once_for_all_its_plans(tiny: Any, tmp_path: Any, monkeypatch: Any) -> None:
    path = write_counter(tmp_path / "c.mp4", 40)
    config = VideoConfig(backend="pyav", fps=5, min_frames=2, min_pixels=784, max_pixels=56 * 28)
    reader = VideoReader(config, tiny.geometry)
    plans = [reader.plan(path), reader.plan_clips(path, [(20, 40), (0, 20)], [False, True]), reader.plan(path, [9, 3])]
    want = torch.cat([reader.pixels(p) for p in plans]).bfloat16()
    calls: list[Any] = []
    decode = reader.decoder.decode
    monkeypatch.setattr(reader.decoder, "decode", lambda path, frames: calls.append(frames) or decode(path, frames))
    prepared = prepare_pixels(reader, plans, "cpu", torch.bfloat16)
    assert prepared is not None and torch.equal(prepared.pixels, want) and len(calls) == 1
    write_counter(path, 50)
    with pytest.raises(InputError, match=r"c\.mp4: the file has changed"):
        prepare_pixels(reader, plans, "cpu", torch.bfloat16)


def test_the_towers_mode_is_restored(tiny: Any, lora: Any, reader: Any, make_plan: Any) -> None:
    bundle = lora(tiny)
    bundle.model.train()
    cached(bundle, FeatureCache(), reader, [make_plan("a", 2)])
    assert all(m.training for m in bundle.model.modules())


def test_waiting_for_pixels_is_measured(tiny: Any, reader: Any, make_plan: Any) -> None:
    class Slow:
        def pixels(self, plan: Any) -> torch.Tensor:
            time.sleep(0.05)
            return reader.pixels(plan)

    cache = FeatureCache()
    cached(tiny, cache, Slow(), [make_plan("a", 2), make_plan("b", 2)])
    assert 0.1 <= cache.decode_seconds < 1.0 and cache.encode_seconds > 0
    before = cache.decode_seconds
    cached(tiny, cache, Slow(), [make_plan("a", 2)])
    assert cache.decode_seconds == before


def test_a_batched_cache_calls_the_tower_once_for_what_is_missing(tiny: Any, reader: Any, make_plan: Any) -> None:
    plans = [make_plan("a", 5), make_plan("b", 1, 56, 56), make_plan("c", 4, 28, 84), make_plan("a", 5)]
    calls: list[int] = []
    handle = tiny.family.vision_tower(tiny.model).register_forward_hook(lambda *_: calls.append(1))
    try:
        batched, single = FeatureCache(batched=True), FeatureCache()
        together = cached(tiny, batched, reader, plans)
        assert len(calls) == 1
        alone = cached(tiny, single, reader, plans)
        assert len(calls) == 1 + 3
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        again = cached(tiny, batched, reader, plans[:2])
        assert torch.equal(again, together[: len(again)])
        assert len(calls) == 4
    finally:
        handle.remove()


def test_a_cache_knows_what_need_not_be_decoded(tiny: Any, reader: Any, make_plan: Any, tmp_path: Any) -> None:
    a, b = make_plan("a", 2), make_plan("b", 2)
    cache = FeatureCache(store=FeatureStore(tmp_path, 1 << 20))
    assert not cache.finder(tiny.family, tiny.model)(a.key)
    cached(tiny, cache, reader, [a])
    found = cache.finder(tiny.family, tiny.model)
    assert found(a.key) and not found(b.key)
    cache.clear()
    assert found(a.key)  # on disk
    assert not FeatureCache().finder(tiny.family, tiny.model)(a.key)
