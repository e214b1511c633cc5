"""The engine's greedy tokens are the argmax of full forwards, whatever the batch; sampling is private and exact."""

from __future__ import annotations

import pytest
import torch
from family_checks import greedy_by_full_forwards

from tempo_fast.config import GenerationConfig
from tempo_fast.generation import Request, decoding, make_engine, slots


def requests_of(make_plan):
    """No video, one, two; long and short, odd frame counts, and a temporal extent far beyond the spatial one."""
    a, b, c = make_plan("a", 3, 28, 56), make_plan("b", 14), make_plan("c", 2)
    return [
        Request((a,), "Describe what happens in this video in order."),
        Request((), "What happened before the blue square?"),
        Request((a, b), "Say it."),
        Request((b,), "Describe it.", max_new_tokens=4),
        Request((c,), "What happened before the blue square? It appears at last."),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_equals_full_forwards(tiny, reader, make_plan, batch_size):
    from tempo_fast.trees.vision import FeatureCache

    features = FeatureCache()
    requests = requests_of(make_plan)
    engine = make_engine(GenerationConfig(batch_size=batch_size, max_new_tokens=9), tiny, reader, features, 0)
    got = engine.generate(requests)
    expected = [greedy_by_full_forwards(tiny, reader, features, r, r.max_new_tokens or 9) for r in requests]
    assert got == expected
    assert len(set(got)) > 2  # the model looks at its input
    assert len(reader.calls) == 3  # one encoding per distinct plan


def test_adapters_take_part(tiny, tiny_lora, reader, make_plan):
    from tempo_fast.trees.vision import FeatureCache

    requests = requests_of(make_plan)
    config = GenerationConfig(max_new_tokens=8)
    features = FeatureCache()
    engine = make_engine(config, tiny_lora, reader, features, 0)
    on = engine.generate(requests)
    assert on == [greedy_by_full_forwards(tiny_lora, reader, features, r, r.max_new_tokens or 8) for r in requests]
    with tiny_lora.model.disable_adapter():
        off = engine.generate(requests)
        assert engine.provenance()["adapter"] is None
    assert off == make_engine(config, tiny, reader, None, 0).generate(requests)
    assert on != off
    digest = engine.provenance()["adapter"]
    next(p for n, p in tiny_lora.model.named_parameters() if "lora_B" in n).data.add_(0.1)
    assert engine.provenance()["adapter"] not in (None, digest)


def test_whatever_the_checkpoint_reads_is_part_of_the_provenance(tiny_path, tmp_path, reader):
    import shutil

    from tempo_fast.generation import AnswerCache
    from tempo_fast.models.load import load_bundle

    folder = tmp_path / "model"
    shutil.copytree(tiny_path, folder)

    def ask(path):
        bundle = load_bundle(str(path), "float32", "cpu")
        engine = make_engine(GenerationConfig(max_new_tokens=4), bundle, reader, None, 0)
        cache = AnswerCache(tmp_path / "answers.jsonl", engine)
        return cache.answers([Request((), "Say it.")])[0], cache.asked

    first = ask(tiny_path)
    assert first[1] == 1 and ask(folder) == (first[0], 0)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant.", "It appears at last. " * 3))
    again = ask(folder)
    assert again[1] == 1 and again[0] != first[0]


def test_positions_follow_the_pretraining_rule(tiny, reader, make_plan, monkeypatch):
    """transformers' own positions for a video differ and give another answer: ours must be the ones in use."""
    request = Request((make_plan("long", 14),), "Describe it.")
    engine = make_engine(GenerationConfig(max_new_tokens=8), tiny, reader, None, 0)
    right = engine.generate([request])
    shifted = decoding.left_pad

    def squeezed(prompts, pad):
        ids, positions, mask, visual = shifted(prompts, pad)
        last = int(visual[0].nonzero().max())
        positions[:, :, last + 1 :] -= 6
        return ids, positions, mask, visual

    monkeypatch.setattr(decoding, "left_pad", squeezed)
    assert engine.generate([request]) != right


def test_sampling_is_private_seeded_and_independent_of_the_batch(tiny, reader, make_plan):
    requests = requests_of(make_plan)
    config = GenerationConfig(temperature=0.9, max_new_tokens=8, batch_size=3)
    state = torch.get_rng_state()
    first = make_engine(config, tiny, reader, None, 5).generate(requests)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [make_engine(config, tiny, reader, None, 5).generate([r])[0] for r in reversed(requests)]
    assert first == alone[::-1]
    assert first != make_engine(config, tiny, reader, None, 6).generate(requests)
    assert first != make_engine(GenerationConfig(max_new_tokens=8), tiny, reader, None, 5).generate(requests)


def test_repetition_penalty_is_on_when_asked(tiny, reader, make_plan):
    request = [Request((make_plan("a", 4),), "Say it.")]
    plain = make_engine(GenerationConfig(max_new_tokens=24), tiny, reader, None, 0).generate(request)
    strong = make_engine(GenerationConfig(max_new_tokens=24, repetition_penalty=5.0), tiny, reader, None, 0)
    assert strong.generate(request) != plain
    assert strong.provenance()["repetition_penalty"] == 5.0


def test_no_more_tokens_are_held_than_the_bound(tiny, reader, make_plan, monkeypatch):
    requests = [Request((make_plan(str(i), 2 + i),), "Say it.", 1 + 3 * i % 7) for i in range(9)]
    engine = make_engine(GenerationConfig(max_new_tokens=5), tiny, reader, None, 0)
    together = engine.generate(requests)
    held, admit = [], slots.Slots.admit

    def counted(self, *args):
        admit(self, *args)
        held.append((len(self.lengths), max(self.lengths)))

    monkeypatch.setattr(slots.Slots, "admit", counted)
    monkeypatch.setattr(decoding, "MAX_BATCH_TOKENS", 90)
    monkeypatch.setattr(decoding, "MAX_PREFILL_TOKENS", 60)
    assert engine.generate(requests) == together
    assert len(held) > 2 and all(n * longest <= 90 for n, longest in held) and max(held)[0] > 1
