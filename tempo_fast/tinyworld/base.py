"""The embedded base model: loading it, and making it again from its seed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tempo_fast.files import digest, write_json
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD
from tempo_fast.models.load import weights_digest
from tempo_fast.prompts import CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT
from tempo_fast.tinyworld import lessons, scores
from tempo_fast.tinyworld.lessons import Settings
from tempo_fast.tinyworld.network import build_model
from tempo_fast.tinyworld.tokenizer import build_tokenizer

BASE_DIR = Path(__file__).parent / "base"

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    # 112x112 becomes 56x56 and 112x168 becomes 56x84
    "min_pixels": 56 * 56,
    "max_pixels": 56 * 84,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


def load_base(path: str | Path = BASE_DIR) -> tuple[Any, Any]:
    """(model in fp32 and eval mode, tokenizer) of the embedded base, or of one that `rebuild` wrote elsewhere."""
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def base_tokenizer() -> Any:
    """The base's tokenizer, made from the project's prompts and the world's vocabulary."""
    return build_tokenizer([CLIP_PROMPT, WINDOW_PROMPT, *VIDEO_PROMPTS])


def rebuild(
    out_dir: str | Path = BASE_DIR,
    seed: int = 0,
    settings: Settings | None = None,
    *,
    score: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the base from its seed and write it to `out_dir`; returns its card.

    On one machine, with one torch and one number of threads, the same seed gives the same weights.
    `out_dir` is replaced at the end only. `score=False` leaves the measured scores out of the card.
    """
    settings = settings or Settings()
    out = Path(out_dir)
    started = time.monotonic()
    tokenizer = base_tokenizer()
    model = build_model(tokenizer, seed)
    model.train()
    with _bar(settings, progress) as report:
        lessons.look(model, seed, settings, report)
        bank = lessons.keep(model, seed, settings, report)
        lessons.tell(model, tokenizer, seed, bank, settings, report)
        lessons.stretch(model, tokenizer, seed, bank, settings, report)
        lessons.muddle(model, tokenizer, seed, bank, settings, report)
    seconds = time.monotonic() - started
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        save(model, tokenizer, staging)
        # scores are those of the stored weights, rounding included
        stored, _ = load_base(staging)
        card = {
            "seed": seed,
            "settings": asdict(settings),
            "settings_digest": digest({"seed": seed, **asdict(settings)}),
            "parameters": sum(p.numel() for p in stored.parameters()),
            "weights_digest": weights_digest(str(staging)),
            "torch": torch.__version__.split("+")[0],
            "threads": torch.get_num_threads(),
            "seconds": round(seconds),
            "scores": scores.score_base(stored, tokenizer, seed) if score else None,
        }
        write_json(staging / "card.json", card)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return card


def save(model, tokenizer, out: Path) -> None:
    """Weights in half precision, tokenizer, and the configuration files that readers of Qwen2-VL expect."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half = half.half()
    half.generation_config.update(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


@contextmanager
def _bar(settings: Settings, wanted: bool):
    """A progress bar over all steps, silent when standard error is no terminal."""
    from tqdm import tqdm

    steps = settings.tell_steps + settings.stretch_steps + settings.muddle_steps
    total = settings.look_rounds * settings.look_steps + settings.bank + steps
    with tqdm(total=total, unit="step", disable=not (wanted and sys.stderr.isatty())) as bar:

        def report(lesson: str, step: int, loss: float, accuracy: float) -> None:
            bar.set_description(lesson, refresh=False)
            if lesson != "keep":
                bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
            bar.update()

        yield report


def quick(settings: Settings | None = None) -> Settings:
    """Settings of a few steps each: to see that a rebuild runs."""
    steps = {"look_steps": 3, "tell_steps": 6, "clip_steps": 1, "stretch_steps": 6, "muddle_steps": 6}
    return replace(settings or Settings(), **steps, bank=2, look_batch=8, tokens=400)
