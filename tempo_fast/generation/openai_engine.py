"""An OpenAI-compatible endpoint as the engine: a served model captions, frames go as base64 JPEG."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from tempo_fast.config import GenerationConfig
from tempo_fast.errors import InputError
from tempo_fast.generation.base import RefusedRequest, Request, sampling_of, sampling_provenance
from tempo_fast.runtime.progress import progress

log = logging.getLogger(__name__)

GRACE = 0.5
"""Seconds that threads get to finish once nothing more is wanted of them: a frame being decoded, not an answer."""

LONGEST_PAUSE = 30.0
"""Seconds between two tries at most, unless Retry-After asks for more."""

RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}

NO_ENTRY = {401, 403, 404}
"""Refusals of everyone alike; any other 4xx is about its own request, such as 400 for one that is too long."""


class OpenAIEngine:
    """Chat completions over HTTP, ``generation.batch_size`` requests in flight at most.

    Videos go as one image part per frame, at the size the reader plans. ``generation.model`` names the model, or the
    adapter, among those that ``/models`` lists; the first one where it is empty. A server that lists none is asked for
    the name as it stands. A key in the environment variable OPENAI_API_KEY is sent as bearer token. Server errors (5xx,
    408, 409, 425, 429) and broken connections are tried again, ``generation.attempts`` times in all, waiting
    ``backoff`` seconds doubled each time up to LONGEST_PAUSE, or what Retry-After says. A signal, or a failure
    for good, ends ``generate`` at once: answers still in flight are not waited for. A request that is refused for what
    it is (4xx) leaves the others alone.

    Args:
        reader: video.reader.VideoReader; None for requests of words alone.
        backoff: seconds before the second try.

    Raises:
        InputError: the endpoint cannot be reached, lists no model or not this one, or answers in another form.
    """

    def __init__(self, config: GenerationConfig, reader: Any, seed: int, *, backoff: float = 0.5) -> None:
        self.config, self.reader, self.seed, self.backoff = config, reader, seed, backoff
        self.base = config.endpoint.rstrip("/")
        served = self._served()
        if not served and not config.model:
            raise InputError(f"generation.endpoint: {self.base} lists no model; name one in generation.model")
        if served and config.model and config.model not in served:
            raise InputError(
                f"generation.model: {self.base} does not serve {config.model!r}; it serves {', '.join(served)}"
            )
        self.model = config.model or next(iter(served))
        # vLLM takes what is left out from the checkpoint's generation_config.json (vllm-project/vllm 0.32.0:
        # vllm/config/model.py, get_diff_sampling_param), others know no such fields
        self._explicit = served.get(self.model, {}).get("owned_by") == "vllm"
        if len(served) > 1 and not config.model:
            log.info("%s serves %d models; %s is asked", self.base, len(served), self.model)

    def _served(self) -> dict[str, dict[str, Any]]:
        """The models that the endpoint lists, by name."""
        reply = self._call("/models", None)
        models = (reply.get("data") or []) if isinstance(reply, dict) else None
        if not isinstance(models, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in models
        ):
            raise InputError(f"generation.endpoint: {self.base}/models answered without a list of data[].id")
        return {m["id"]: m for m in models}

    def provenance(self) -> dict[str, Any]:
        """Engine, the served model's name and sampling parameters."""
        return {"engine": "openai", "model": self.model, **sampling_provenance(self.config, self.seed)}

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine."""
        bar = progress(len(requests), desc, "answer") if desc else None
        texts: list[str] = []
        reasons: dict[int, str] = {}
        futures: list[Future[str]] = [Future() for _ in requests]
        work = iter(zip(requests, futures, strict=True))
        stop, lock = threading.Event(), threading.Lock()

        def answer() -> None:
            while not stop.is_set():
                with lock:
                    request, future = next(work, (None, None))
                if request is None or future is None:
                    return
                try:
                    future.set_result(self._answer(request, stop))
                except BaseException as e:
                    future.set_exception(e)

        # Not an executor: Python waits for its threads at exit, and one may be blocked in a read for minutes.
        threads = [threading.Thread(target=answer, daemon=True) for _ in requests[: max(1, self.config.batch_size)]]
        try:
            for thread in threads:
                thread.start()
            for future in futures:
                try:
                    texts.append(future.result())
                except RefusedRequest as e:
                    reasons[len(texts)] = str(e)
                    texts.append("")
                if bar is not None:
                    bar.update(1)
        finally:
            stop.set()
            _join(threads, GRACE)
            if bar is not None:
                bar.close()
        if reasons:
            raise RefusedRequest(reasons, texts)
        return texts

    def _answer(self, request: Request, stop: threading.Event) -> str:
        sampling = sampling_of(self.config, self.seed, request)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(request),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed >> 29,  # 31 bits
        }
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
        if self._explicit or sampling.repetition_penalty != 1:
            body["repetition_penalty"] = sampling.repetition_penalty
        if self._explicit:
            body |= {"top_k": -1, "min_p": 0.0}
        reply = self._call("/chat/completions", body, stop)
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = ()
        if text is not None and not isinstance(text, str):
            raise InputError(f"generation.endpoint: {self.base} answered without choices[0].message.content")
        # half a surrogate pair is no text that a file can hold
        return (text or "").encode(errors="replace").decode().strip()

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """The turns; words alone as a string, which every server reads."""
        said = [(role, text) for turn in request.turns for role, text in zip(("user", "assistant"), turn, strict=True)]
        messages: list[dict[str, Any]] = [{"role": r, "content": text} for r, text in [*said, ("user", request.prompt)]]
        images = [image for plan in request.plans for image in jpegs(self.reader, plan)]
        if images:
            urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
            parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            messages[0]["content"] = [*parts, {"type": "text", "text": messages[0]["content"]}]
        return messages

    def _call(self, path: str, body: dict[str, Any] | None, stop: threading.Event | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body is not None else None
        reason = ""
        attempts = self.config.attempts
        for attempt in range(attempts):
            wait = min(LONGEST_PAUSE, self.backoff * 2**attempt)
            try:
                call = urllib.request.Request(self.base + path, data, headers)
                with urllib.request.urlopen(call, timeout=self.config.timeout_s) as response:  # noqa: S310 - the user's own URL
                    return json.loads(response.read())
            except urllib.error.HTTPError as e:
                said = " ".join(e.read(300).decode(errors="replace").split())
                reason = f"HTTP {e.code}: {said or e.reason}"
                if e.code not in RETRY_STATUS:
                    told = f"generation.endpoint: {self.base}{path} refuses ({reason})"
                    own = body is not None and 400 <= e.code < 500 and e.code not in NO_ENTRY
                    raise (RefusedRequest({0: told}, [""]) if own else InputError(told)) from e
                wait = max(wait, _seconds(e.headers.get("Retry-After")))
            except (
                OSError,
                http.client.HTTPException,
                json.JSONDecodeError,
                UnicodeDecodeError,
                RecursionError,
            ) as e:  # refused, reset, timed out, cut off
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            except ValueError as e:
                raise InputError(f"generation.endpoint: {self.base!r} is not a URL ({e})") from e
            if attempt + 1 < attempts:
                _pause(wait, stop)
            if stop is not None and stop.is_set():
                break
        raise InputError(f"generation.endpoint: {self.base}{path} cannot be reached, {attempts} attempts ({reason})")


def _pause(seconds: float, stop: threading.Event | None) -> None:
    """Wait, or less when ``stop`` is set."""
    (stop or threading.Event()).wait(seconds)


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    """Wait for threads, together no longer than ``seconds``."""
    end = time.monotonic() + seconds
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, end - time.monotonic()))


def _seconds(value: str | None) -> float:
    try:
        return min(60.0, float(value or 0))
    except ValueError:  # an HTTP date
        return 0.0


def jpegs(reader: Any, plan: Any) -> list[bytes]:
    """The frames of a plan at its planned size, as JPEG files."""
    from PIL import Image

    out = []
    for frame in reader.resized(plan).cpu():
        buffer = io.BytesIO()
        Image.fromarray(frame.numpy()).save(buffer, "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out
