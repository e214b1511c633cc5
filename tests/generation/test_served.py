"""The endpoint engine against transformers' own server: a process on loopback with a random LLaVA behind it.

(transformers' processors of the video families need torchvision; LLaVA's does not.) Skipped where fastapi, uvicorn or
openai is missing.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from counter_clips import write_counter

from tempo_fast.config import GenerationConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import Request, openai_engine
from tempo_fast.generation.openai_engine import OpenAIEngine, jpegs
from tempo_fast.video.reader import VideoReader

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)

NAME = "tiny/llava"
# images where they stand, as LLaVA's own templates write them
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|image_pad|>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(hub: Path) -> Path:
    """A snapshot in a hub's cache folder, which is where the server looks for what it can serve."""
    import transformers

    tokenizer = tiny_qwen.make_tokenizer()
    tokenizer.chat_template = CHAT
    token = tokenizer.convert_tokens_to_ids
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "initializer_range": 0.15,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
            "bos_token_id": None, "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
        },
        image_token_index=token("<|image_pad|>"), image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    )
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        chat_template=CHAT, image_token="<|image_pad|>", num_additional_image_tokens=1,
    )  # fmt: skip
    repository = hub / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    model.save_pretrained(snapshot)
    processor.save_pretrained(snapshot)
    return snapshot


class Server:
    def __init__(self, folder: Path) -> None:
        self.snapshot = write_checkpoint(folder / "hub")
        self.folder, self.log = folder, folder / "log"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        main = "from transformers.cli.transformers import main; main()"
        options = ["serve", "--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port)]
        env = {**os.environ, "HF_HUB_CACHE": str(self.folder / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", main, *options], stdout=log, stderr=log, env=env)

    def wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def answered(self) -> int:
        return self.log.read_bytes().count(b'"POST /v1/chat/completions HTTP/1.1" 200')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = Server(tmp_path_factory.mktemp("served"))
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Any:
    config = VideoConfig(backend="pyav", fps=2, min_frames=2, min_pixels=784, max_pixels=56 * 56)
    reader = VideoReader(config, tiny.geometry)
    path = tmp_path_factory.mktemp("v") / "counter.mp4"
    write_counter(path, 40, size=(56, 72))
    reader.path = str(path)
    return reader


def engine_of(server: Server, reader: Any, **config: Any) -> OpenAIEngine:
    settings = GenerationConfig(**{"engine": "openai", "endpoint": server.url, "max_new_tokens": 14, **config})
    return OpenAIEngine(settings, reader, 3, backoff=0.2)


def requests_of(reader: Any) -> list[Request]:
    clip, other, whole = reader.plan(reader.path, [1, 30]), reader.plan(reader.path, [7]), reader.plan(reader.path)
    return [
        Request((clip,), "Describe what happens in this video in order."),
        Request((), "What happened before the blue square?"),
        Request((clip, other), "Say it.", 5),
        Request((whole,), "Then?", turns=[("Say it.", "A red circle moves left."), ("So?", "It appears at last.")]),
        Request((), "So?", turns=[("Say it.", "A red circle moves left.")]),
    ]


def by_hand(server: Server, reader: Any, requests: list[Request]) -> list[str]:
    """The same files through the same checkpoint, without a server."""
    import transformers
    from PIL import Image

    model = transformers.LlavaForConditionalGeneration.from_pretrained(server.snapshot)
    processor = transformers.AutoProcessor.from_pretrained(server.snapshot)
    texts = []
    for r in requests:
        images = [Image.open(io.BytesIO(b)).convert("RGB") for plan in r.plans for b in jpegs(reader, plan)]
        said = [x for turn in r.turns for x in turn] + [r.prompt]
        messages = [
            {"role": "assistant" if i % 2 else "user", "content": [{"type": "text", "text": text}]}
            for i, text in enumerate(said)
        ]
        messages[0]["content"] = [{"type": "image"}] * len(images) + messages[0]["content"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=r.max_new_tokens or 14)
        texts.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_captions_of_a_real_video_by_a_real_server(server: Server, reader: Any) -> None:
    requests = requests_of(reader)
    want = by_hand(server, reader, requests)
    assert len(set(want)) == len(want)  # it looks at frames and turns
    for size in (1, 4):
        engine = engine_of(server, reader, batch_size=size, model=NAME if size == 1 else "")
        assert engine.generate(requests * 2) == want * 2
    assert engine.provenance()["model"] == NAME


def test_a_model_that_is_not_served_is_named(server: Server, reader: Any) -> None:
    with pytest.raises(InputError, match=rf"generation\.model: .* does not serve 'other'; it serves {NAME}$"):
        engine_of(server, reader, model="other")
    # this server knows no repetition_penalty: its refusal reaches the user, at once
    with pytest.raises(InputError, match=r"refuses \(HTTP 422: .*repetition_penalty"):
        engine_of(server, reader, repetition_penalty=1.05).generate([Request((), "So?")])


def test_a_server_killed_and_started_again_is_asked_again(
    server: Server, reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "LONGEST_PAUSE", 0.5)
    requests = [Request((), f"What happened before {i}?") for i in range(40)]
    engine = engine_of(server, reader, batch_size=3, attempts=500)
    want = engine.generate(requests)
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.extend(engine.generate(requests)))
    before = server.answered()
    asking.start()
    while server.answered() < before + 4:
        time.sleep(0.005)
    server.kill()
    assert server.answered() < before + len(requests) and asking.is_alive()
    server.start()
    server.wait()
    asking.join(timeout=120)
    assert texts == want


def test_a_server_that_dies_for_good(server: Server, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(server, reader, batch_size=2, attempts=3)
    monkeypatch.setattr(openai_engine, "_pause", lambda seconds, stop: server.kill())
    before = server.answered()
    errors: list[str] = []

    def ask() -> None:
        try:
            engine.generate([Request((), f"Who comes {i}?") for i in range(200)])
        except InputError as e:
            errors.append(str(e))

    asking = threading.Thread(target=ask)
    asking.start()
    while server.answered() < before + 3:
        time.sleep(0.005)
    server.kill()
    asking.join(timeout=60)
    assert len(errors) == 1 and "\n" not in errors[0]
    assert errors[0].startswith(f"generation.endpoint: {server.url}/chat/completions cannot be reached, 3 attempts (")


def test_what_is_sent_is_what_was_read(reader: Any) -> None:
    """JPEG at quality 90: close to the pixels that the reader planned."""
    from PIL import Image

    plan = reader.plan(reader.path, [1, 30])
    frames = reader.resized(plan)
    for data, frame in zip(jpegs(reader, plan), frames, strict=True):
        image = torch.frombuffer(bytearray(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8).view(frame.shape)
        assert (image.float() - frame.float()).abs().mean() < 6
