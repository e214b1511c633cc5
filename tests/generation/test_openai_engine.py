"""The endpoint engine against a server process of its own on loopback, with failures on demand."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tempo_fast.config import GenerationConfig, JudgeConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import AnswerCache, RefusedRequest, Request, make_judge, openai_engine
from tempo_fast.generation.openai_engine import OpenAIEngine

# Answers with the number of images and the words it got. A prompt "fail K CODE" fails K times, "drop" hangs up once.
SERVER = r"""
import json, sys, threading
from urllib.parse import unquote
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen, lock, bodies, running, most = {}, threading.Lock(), [], 0, 0

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def reply(self, code, obj, headers=()):
        data = json.dumps(obj).encode()
        self.send_response(code)
        for k, v in headers: self.send_header(k, v)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if self.path == "/v1/models": self.reply(200, {"data": [{"id": "tiny-served"}, {"id": "other"}]})
        elif self.path == "/vllm/models": self.reply(200, {"data": [{"id": "v", "owned_by": "vllm"}]})
        elif self.path.startswith("/shape"): self.reply(200, json.loads(unquote(self.path.split("/")[2])))
        elif self.path == "/empty/models": self.reply(200, {"data": []})
        elif self.path == "/log": self.reply(200, {"bodies": bodies, "seen": seen, "most": most})
        else: self.reply(404, {"error": "no such page"})
    def do_POST(self):
        global running, most
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        if isinstance(content, str): content = [{"type": "text", "text": content}]
        last = body["messages"][-1]["content"]
        text = last if isinstance(last, str) else last[-1]["text"]
        with lock:
            running += 1; most = max(most, running)
            seen[text] = seen.get(text, 0) + 1
            count = seen[text]
            bodies.append(body | {"auth": self.headers.get("Authorization")})
        threading.Event().wait(0.03)
        with lock: running -= 1
        words = text.split()
        if words[0] == "slow": threading.Event().wait(float(words[1]))
        if words[0] == "fail" and count <= int(words[1]):
            return self.reply(int(words[2]), {"error": "try " + str(count)}, [("Retry-After", "0.01")])
        if words[0] == "drop" and count == 1:
            self.close_connection = True
            return self.connection.close()
        if words[0] == "half" and count == 1:
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return
        if words[0] == "shape": return self.reply(200, json.loads(text[6:]))
        if words[0] == "odd": return self.reply(200, {"choices": []})
        images = sum(p["type"] == "image_url" for p in content)
        self.reply(200, {"choices": [{"message": {"content": f" {images} images: {text}\n"}}]})

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.terminate()
    process.wait(timeout=10)


@dataclass(frozen=True)
class Plan:
    key: str
    n: int
    height: int = 28
    width: int = 56


class Frames:
    def resized(self, plan):
        """Every frame of one colour of its own."""
        colours = torch.arange(plan.n, dtype=torch.uint8)[:, None] * 60 + torch.tensor([10, 20, 30], dtype=torch.uint8)
        return colours[:, None, None, :].expand(-1, plan.height, plan.width, -1).contiguous()


def engine_of(server, path="/v1", attempts=4, **config):
    config = GenerationConfig(engine="openai", endpoint=server + path, attempts=attempts, **config)
    return OpenAIEngine(config, Frames(), 3, backoff=0.01)


def said(body):
    """The last words of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def log_of(server):
    return json.loads(urllib.request.urlopen(server + "/log").read())


def test_answers_in_order_with_frames(server, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("OPENAI_API_KEY", "k-123")
    engine = engine_of(server, max_new_tokens=17, repetition_penalty=1.05, batch_size=4)
    requests = [Request((Plan("a", 3), Plan("b", 1)), "two videos"), Request((), "none", 5)]
    requests += [Request((), f"number {i}") for i in range(9)]
    assert engine.generate(requests) == ["4 images: two videos", "0 images: none"] + [
        f"0 images: number {i}" for i in range(9)
    ]
    log = log_of(server)
    assert 1 < log["most"] <= 4  # in parallel, and no more than batch_size
    bodies = {said(b): b for b in log["bodies"]}
    body = bodies["two videos"]
    assert body["model"] == "tiny-served" and body["auth"] == "Bearer k-123"
    assert (body["max_tokens"], body["temperature"], body["repetition_penalty"]) == (17, 0.0, 1.05)
    assert bodies["none"]["max_tokens"] == 5
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))))
    assert image.shape == (28, 56, 3)
    assert np.abs(image.astype(int) - [70, 80, 90]).max() <= 3  # the second frame of the first video
    assert engine.provenance() == {
        "engine": "openai",
        "model": "tiny-served",
        "temperature": 0.0,
        "repetition_penalty": 1.05,
        "max_new_tokens": 17,
    }


@pytest.mark.parametrize("prompt", ["fail 2 500", "fail 3 429", "fail 1 503", "drop once", "half an answer"])
def test_tried_again(server, prompt):
    assert engine_of(server).generate([Request((), prompt), Request((), "fine")]) == [
        f"0 images: {prompt}",
        "0 images: fine",
    ]
    assert log_of(server)["seen"][prompt] > 1


def test_waits_longer_each_time(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(openai_engine, "_pause", lambda seconds, stop: waits.append(seconds))
    engine = engine_of(server, attempts=5)
    engine.generate([Request((), "fail 4 502")])
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08])


def test_gives_up_with_one_sentence(server):
    with pytest.raises(InputError, match=r"generation\.endpoint: .*cannot be reached, 4 attempts \(HTTP 500.*try 4"):
        engine_of(server).generate([Request((), "fail 99 500")])
    with pytest.raises(InputError, match="refuses.*HTTP 400"):
        engine_of(server).generate([Request((), "fail 98 400")])
    assert log_of(server)["seen"]["fail 98 400"] == 1  # not tried again
    with pytest.raises(InputError, match="without choices"):
        engine_of(server).generate([Request((), "odd")])
    with pytest.raises(InputError, match="lists no model"):
        engine_of(server, "/empty")
    with pytest.raises(InputError, match="refuses.*404"):
        engine_of(server, "/nowhere")


@pytest.mark.parametrize(
    "reply", ["[]", '"hi"', "3", '{"data": ["x"]}', '{"data": [{"name": "x"}]}', '{"data": [[]]}',
              '{"data": {"id": "x"}}',
              '{"data": "x"}', '{"data": [{"id": 3}]}', '{"data": [{"id": "x"}, null]}'],
)  # fmt: skip
def test_lists_of_models_in_another_form(server, reply):
    with pytest.raises(
        InputError, match=r"generation\.endpoint: http.*/models answered without a list of data\[\]\.id$"
    ):
        engine_of(server, f"/shape/{urllib.parse.quote(reply, safe='')}")


@pytest.mark.parametrize(
    "reply", ["[]", '"hi"', "3", "null", '{"choices": null}', '{"choices": {"0": 1}}', '{"choices": ["x"]}', "{}",
              '{"choices": [{"message": "x"}]}', '{"choices": [{"message": {"content": [{"text": "x"}]}}]}',
              '{"choices": [{"message": {"content": 3}}]}', '{"choices": [{"message": {"content": {}}}]}', '{"a": []}'],
)  # fmt: skip
def test_completions_in_another_form(server, reply):
    with pytest.raises(InputError, match=r"answered without choices\[0\]\.message\.content$"):
        engine_of(server).generate([Request((), f"shape {reply}")])


def test_completions_without_words(server):
    texts = ['{"choices": [{"message": {"content": null}}]}', r'{"choices": [{"message": {"content": " \ud83d x"}}]}']
    assert engine_of(server).generate([Request((), f"shape {t}") for t in texts]) == ["", "? x"]


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_is_refused_leaves_the_others(server, tmp_path, code):
    """Every run ends the same: the refused one is asked each time, the others once."""
    prompts = [f"fine {code} {i}" for i in range(7)]
    prompts[2:2], prompts[5:5] = [f"fail 99 {code} a"], [f"fail 99 {code} b"]
    engine = engine_of(server, batch_size=3)
    files = []
    for chunk in (4, 100, 100):
        with AnswerCache(tmp_path / f"{chunk}.jsonl", engine, chunk) as cache:
            with pytest.raises(RefusedRequest, match=f"refuses .HTTP {code}") as e:
                cache.answers([Request((), p) for p in [*prompts, prompts[2]]])
            assert sorted(e.value.reasons) == [2, 5, 9] and "\n" not in str(e.value)
            assert e.value.texts == ["" if p.startswith("fail") else f"0 images: {p}" for p in [*prompts, prompts[2]]]
        files.append((tmp_path / f"{chunk}.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    with AnswerCache(tmp_path / "100.jsonl", engine) as cache:
        cache.answers([Request((), p) for p in prompts if p.startswith("fine")])
        assert cache.asked == 0


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_a_refusal_of_everyone_is_no_single_requests(server, code):
    with pytest.raises(InputError) as e:
        engine_of(server, attempts=1).generate([Request((), f"fail 99 {code} all"), Request((), "fail 99 400 c")])
    assert not isinstance(e.value, RefusedRequest) and f"HTTP {code}" in str(e.value)


# Asks until a signal comes; says how it ended. SIGTERM raises, as outside training in a run.
ASKING = """
import signal, sys
from tempo_fast.config import GenerationConfig
from tempo_fast.errors import Interrupted
from tempo_fast.generation import Request
from tempo_fast.generation.openai_engine import OpenAIEngine

def stop(number, frame):
    raise Interrupted("terminated", 75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.default_int_handler)
engine = OpenAIEngine(GenerationConfig(engine="openai", endpoint=sys.argv[1], batch_size=3), None, 0, backoff=60)
try:
    engine.generate([Request((), f"{sys.argv[2]} {i}") for i in range(9)])
except KeyboardInterrupt:
    sys.exit(130)
except Interrupted as e:
    sys.exit(e.exit_code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("prompt", ["slow 100", "fail 99 503"])
def test_a_signal_waits_for_no_answer(server, number, code, prompt):
    """The process is gone soon after the signal, with requests in flight or waiting to be tried again."""
    prompt = f"{prompt} signal {number}"
    child = subprocess.Popen([sys.executable, "-c", ASKING, server + "/v1", prompt])
    try:
        end = time.monotonic() + 60
        while sum(prompt in text for text in log_of(server)["seen"]) < 3:
            assert child.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        sent = time.monotonic()
        child.send_signal(number)
        assert child.wait(timeout=30) == code
        assert time.monotonic() - sent < 5  # the wait itself would be 60 or 100
    finally:
        child.kill()
        child.wait()
    assert sum(prompt in text for text in log_of(server)["seen"]) == 3  # no new request after the signal


def test_unreachable(server):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    with pytest.raises(InputError, match=r"generation\.endpoint: http://127.*cannot be reached, 2 attempts"):
        engine_of(f"http://127.0.0.1:{free}", attempts=2)
    with pytest.raises(InputError, match="not a URL"):
        engine_of("nonsense", attempts=2)


def test_seeds_differ_by_request_and_repeat(server):
    engine = engine_of(server, temperature=0.7)
    engine.generate([Request((), "seed a"), Request((), "seed b"), Request((), "seed a")])
    seeds: dict[str, set[int]] = {}
    for body in log_of(server)["bodies"]:
        text = said(body)
        if text.startswith("seed"):
            seeds.setdefault(text, set()).add(body["seed"])
    assert [len(v) for v in seeds.values()] == [1, 1] and seeds["seed a"] != seeds["seed b"]
    assert engine.provenance()["seed"] == 3


def test_turns_and_settings_of_single_requests(server):
    engine = engine_of(server, max_new_tokens=9, top_p=0.9)
    turns = [("own first", "own reply"), ("own second", "")]
    engine.generate(
        [
            Request((Plan("a", 2),), "own last", turns=turns),
            Request((), "own drawn", temperature=0.7, sample=1),
            Request((), "own drawn", temperature=0.7, sample=2, top_p=0.5),
        ]
    )
    bodies = [b for b in log_of(server)["bodies"] if said(b).startswith("own")]
    (asked,) = [b for b in bodies if said(b) == "own last"]
    assert [m["role"] for m in asked["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    first = asked["messages"][0]["content"]
    assert [p["type"] for p in first] == ["image_url", "image_url", "text"] and first[-1]["text"] == "own first"
    assert [m["content"] for m in asked["messages"][1:]] == ["own reply", "own second", "", "own last"]
    assert asked["temperature"] == 0 and "top_p" not in asked
    drawn = [b for b in bodies if said(b) == "own drawn"]
    assert sorted(b["top_p"] for b in drawn) == [0.5, 0.9] and len({b["seed"] for b in drawn}) == 2
    assert all(0 <= b["seed"] < 2**31 and "top_k" not in b for b in bodies)


def test_the_model_is_chosen_by_name(server):
    engine = engine_of(server, model="other")
    engine.generate([Request((), "which model")])
    assert [b["model"] for b in log_of(server)["bodies"] if said(b) == "which model"] == ["other"]
    assert engine.provenance()["model"] == "other"
    with pytest.raises(InputError, match=r"does not serve 'third'; it serves tiny-served, other$"):
        engine_of(server, model="third")
    assert engine_of(server, "/empty", model="third").model == "third"  # a server that lists nothing


def test_vllm_is_told_what_it_would_else_take_from_the_checkpoint(server):
    engine = engine_of(server, "/vllm")
    engine.generate([Request((), "to vllm"), Request((), "to vllm too", temperature=1.0)])
    bodies = {said(b): b for b in log_of(server)["bodies"]}
    for words in ("to vllm", "to vllm too"):
        assert [bodies[words][name] for name in ("top_k", "min_p", "repetition_penalty")] == [-1, 0.0, 1.0]


def test_the_judge_needs_no_reader(server):
    assert make_judge(JudgeConfig(), 0) is None
    judge = make_judge(JudgeConfig(endpoint=server + "/v1", model="other", batch_size=2, max_new_tokens=33), 4)
    assert judge.generate([Request((), "judge this")]) == ["0 images: judge this"]
    (body,) = [b for b in log_of(server)["bodies"] if said(b) == "judge this"]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 33, "other")
    assert body["messages"] == [{"role": "user", "content": "judge this"}]
