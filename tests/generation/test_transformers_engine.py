"""The engine's greedy tokens are the argmax of full forwards, whatever the batch; sampling is private and exact."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from family_checks import greedy_by_full_forwards

from tempo_fast.config import GenerationConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation import Request, decoding, make_engine, request_identity, slots
from tempo_fast.generation import transformers_engine as te
from tempo_fast.generation.base import sampling_of
from tempo_fast.trees.vision import FeatureCache


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
    features = FeatureCache()
    requests = requests_of(make_plan)
    engine = make_engine(GenerationConfig(batch_size=batch_size, max_new_tokens=9), tiny, reader, features, 0)
    got = engine.generate(requests)
    expected = [greedy_by_full_forwards(tiny, reader, features, r, r.max_new_tokens or 9) for r in requests]
    assert got == expected
    assert len(set(got)) > 2  # the model looks at its input
    assert len(reader.calls) == 3  # one encoding per distinct plan


def test_adapters_take_part(tiny, tiny_lora, reader, make_plan):
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


def mixed_requests(make_plan):
    """Lengths, videos, settings and turns of all kinds, some asked for several times."""
    rng = random.Random(3)
    plans = [make_plan("a", 3, 28, 56), make_plan("b", 9), make_plan("c", 2)]
    prompts = ["Say it.", "Describe what happens in this video in order.", "What happened before the blue square?"]
    out = []
    for i in range(23):
        shown = rng.sample(plans, rng.choice([0, 1, 1, 2]))
        turns = [("Say it.", "A red circle moves left.")] * rng.choice([0, 0, 1, 2])
        temperature = rng.choice([None, 0.0, 0.8, 1.5])
        r = Request(
            shown, rng.choice(prompts), rng.choice([1, 2, 5, 9, 30]), turns, i % 3, temperature, rng.choice([None, 0.8])
        )
        out += [r, replace(r, sample=r.sample + 5)] if i % 4 == 0 else [r]
    return out


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_do_not_depend_on_their_company(tiny, reader, make_plan, penalty, monkeypatch):
    """Alone, in slots of any number, all at once, and when no answer enters before the others are finished."""
    requests = mixed_requests(make_plan)
    features = FeatureCache()

    def engine(slots_):
        config = GenerationConfig(batch_size=slots_, repetition_penalty=penalty, temperature=0.4, max_new_tokens=30)
        return make_engine(config, tiny, reader, features, 4)

    alone = [engine(1).generate([r])[0] for r in requests]
    assert len(set(alone)) > 12 and any(not a for a in alone) is False
    steps = []
    for size in (1, 2, 5, 64):
        e = engine(size)
        made = []
        inner = e.decoder
        monkeypatch.setattr(e, "decoder", lambda r, i=inner, m=made: m.append(i(r)) or m[0])
        assert e.generate(requests) == alone
        steps.append(made[0].steps)
    assert steps == sorted(steps, reverse=True)
    e = engine(5)
    static = e.decoder(requests)
    static.static = True
    monkeypatch.setattr(e, "decoder", lambda r: static)
    assert e.generate(requests) == alone
    assert static.steps > steps[2]


def test_greedy_rows_with_turns_equal_full_forwards(tiny, reader, make_plan):
    features = FeatureCache()
    requests = [replace(r, temperature=0.0) for r in mixed_requests(make_plan)]
    engine = make_engine(GenerationConfig(batch_size=3), tiny, reader, features, 4)
    expected = [greedy_by_full_forwards(tiny, reader, features, r, r.max_new_tokens) for r in requests]
    assert engine.generate(requests) == expected


def test_samples_of_one_question_read_its_prompt_once(tiny, reader, make_plan, monkeypatch):
    request = Request((make_plan("a", 6),), "Say it.", temperature=1.0)
    engine = make_engine(GenerationConfig(max_new_tokens=12), tiny, reader, None, 0)
    rows = []
    hidden = tiny.family.hidden_states
    monkeypatch.setattr(
        tiny.family,
        "hidden_states",
        lambda m, ids, *rest: rows.append(tuple(ids.shape)) or hidden(m, ids, *rest),
        raising=False,
    )
    texts = engine.generate([replace(request, sample=i) for i in range(8)] + [request])
    assert len(set(texts)) > 4 and texts[0] == texts[-1]
    assert [shape[0] for shape in rows if shape[1] > 1] == [1]
    assert max(shape[0] for shape in rows) == 9


def test_repetition_penalty_is_transformers_own(tiny, reader):
    """The tokens of ``generate`` for one prompt; a padded batch would not give them."""
    text = "What happened before the blue square?"
    prompt = tiny.family.build_prompt(tiny.tokenizer, tiny.config, text, [])
    ids = prompt.input_ids[None]
    out = tiny.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.4, do_sample=False, max_new_tokens=20,
        eos_token_id=te.stop_tokens(tiny),
    )  # fmt: skip
    tokens = [t for t in out[0, ids.shape[1] :].tolist() if t not in te.stop_tokens(tiny)]
    engine = make_engine(GenerationConfig(max_new_tokens=20, repetition_penalty=1.4), tiny, reader, None, 0)
    got = engine.generate([Request((), text), Request((), "Say it. " * 9, max_new_tokens=3)])
    assert got[0] == tiny.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny, lora):
    """A folder with a random adapter, and its model."""
    bundle = lora(tiny, seed=9)
    folder = tmp_path_factory.mktemp("adapter")
    bundle.model.save_pretrained(folder)
    return folder, bundle


def test_a_saved_adapter_answers_and_leaves(tiny, saved, reader, make_plan):
    folder, loaded = saved
    requests = requests_of(make_plan)
    base = make_engine(GenerationConfig(max_new_tokens=8), tiny, reader, None, 0)
    before, names = base.generate(requests), [n for n, _ in tiny.model.named_modules()]
    config = GenerationConfig(max_new_tokens=8, adapter=str(folder))
    engine = make_engine(config, tiny, reader, FeatureCache(), 0)
    with_adapter = make_engine(GenerationConfig(max_new_tokens=8), loaded, reader, None, 0).generate(requests)
    assert engine.generate(requests) == with_adapter != before
    assert [n for n, _ in tiny.model.named_modules()] == names and not hasattr(tiny.model, "peft_config")
    assert base.generate(requests) == before and base.provenance()["adapter"] is None
    with pytest.raises(ZeroDivisionError):  # taken off whatever happens
        monkeyed = make_engine(config, tiny, Broken(), FeatureCache(), 0)
        monkeyed.generate(requests)
    assert [n for n, _ in tiny.model.named_modules()] == names
    digest = engine.provenance()["adapter"]
    other = folder.parent / "other"
    shutil.copytree(folder, other, dirs_exist_ok=True)
    assert make_engine(replace(config, adapter=str(other)), tiny, reader, None, 0).provenance()["adapter"] == digest
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert make_engine(replace(config, adapter=str(other)), tiny, reader, None, 0).provenance()["adapter"] != digest


class Broken:
    def pixels(self, plan):
        raise ZeroDivisionError


def test_an_adapter_that_cannot_be_used_is_named(tiny, tiny_lora, saved, reader, tmp_path):
    folder, _ = saved
    with pytest.raises(InputError, match=r"generation\.adapter: .*nowhere is no PEFT adapter \(no adapter_config"):
        make_engine(GenerationConfig(adapter=str(tmp_path / "nowhere")), tiny, reader, None, 0)
    with pytest.raises(InputError, match="carries adapters already"):
        make_engine(GenerationConfig(adapter=str(folder)), tiny_lora, reader, None, 0)
    settings, names = (
        json.loads((folder / "adapter_config.json").read_text()),
        [n for n, _ in tiny.model.named_modules()],
    )
    targets = settings["target_modules"]
    wrong = [{"r": 2}, {"target_modules": "nothing"}, {"target_modules": targets.replace("(q|k|v|o)", "(q|k)")}]
    for i, change in enumerate([*wrong, {"target_modules": f"({targets})|.*visual.blocks.0.attn.proj"}]):
        other = tmp_path / str(i)
        shutil.copytree(folder, other)
        (other / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=rf"generation\.adapter: .*{i} does not fit"):
            make_engine(GenerationConfig(adapter=str(other)), tiny, reader, None, 0).generate([Request((), "So?")])
        assert not hasattr(tiny.model, "peft_config") and [n for n, _ in tiny.model.named_modules()] == names


def test_what_a_request_sets_is_part_of_its_identity():
    """And what it leaves alone is not: answers kept before these fields were there stay valid."""
    plan = SimpleNamespace(key="k")
    assert request_identity(Request((plan,), "p", 3)) == [["k"], "p", 3]
    assert request_identity(Request((), "p")) == [[], "p", None]
    variants = [
        Request((plan,), "p", 3, **more)
        for more in ({}, {"turns": [("a", "b")]}, {"turns": [("a", "c")]}, {"sample": 1}, {"temperature": 0.0},
                     {"temperature": 0.5}, {"top_p": 0.5})
    ]  # fmt: skip
    digests = {digest(request_identity(r)) for r in variants}
    assert len(digests) == len(variants)
    seeds = {sampling_of(GenerationConfig(), 0, r).seed for r in variants}
    assert len(seeds) == len(variants)


def test_a_model_with_a_window_is_refused():
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(8))
    with pytest.raises(InputError, match="this model has a DynamicSlidingWindowLayer"):
        slots.Slots().admit(cache, [(0, 0)])
