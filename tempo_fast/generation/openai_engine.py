"""An OpenAI-compatible endpoint as the engine: a served model captions, frames go as base64 JPEG."""

from __future__ import annotations

import base64
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
from tempo_fast.files import digest
from tempo_fast.generation.base import Request, request_identity, sampling_provenance
from tempo_fast.runtime.progress import progress

log = logging.getLogger(__name__)

GRACE = 0.5
"""Seconds that threads get to finish once nothing more is wanted of them: a frame being decoded, not an answer."""

RETRY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}


class OpenAIEngine:
    """Chat completions over HTTP, ``generation.batch_size`` requests in flight at most.

    Videos go as one image part per frame, at the size the reader plans. The model is the first that ``/models`` lists.
    A key in the environment variable OPENAI_API_KEY is sent as bearer token. Server errors (5xx, 408, 409, 425, 429)
    and broken connections are tried again, waiting ``backoff`` seconds doubled each time, or what Retry-After says.
    A signal, or a request that fails for good, ends ``generate`` at once: answers still in flight are not waited for.

    Args:
        attempts: tries per request.
        backoff: seconds before the second try.
        timeout: seconds for one answer.

    Raises:
        InputError: the endpoint cannot be reached, lists no model, or refuses the request.
    """

    def __init__(
        self,
        config: GenerationConfig,
        reader: Any,
        seed: int,
        *,
        attempts: int = 5,
        backoff: float = 0.5,
        timeout: float = 300.0,
    ) -> None:
        self.config, self.reader, self.seed = config, reader, seed
        self.attempts, self.backoff, self.timeout = attempts, backoff, timeout
        self.base = config.endpoint.rstrip("/")
        models = self._call("/models", None).get("data") or []
        if not models:
            raise InputError(f"generation.endpoint: {self.base} lists no model")
        self.model = str(models[0]["id"])
        if len(models) > 1:
            log.info("%s serves %d models; %s is asked", self.base, len(models), self.model)

    def provenance(self) -> dict[str, Any]:
        """Engine, the served model's name and sampling parameters."""
        return {"engine": "openai", "model": self.model, **sampling_provenance(self.config, self.seed)}

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """See base.Engine."""
        bar = progress(len(requests), desc, "answer") if desc else None
        texts = []
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
                texts.append(future.result())
                if bar is not None:
                    bar.update(1)
        finally:
            stop.set()
            _join(threads, GRACE)
            if bar is not None:
                bar.close()
        return texts

    def _answer(self, request: Request, stop: threading.Event) -> str:
        content: list[dict[str, Any]] = []
        for plan in request.plans:
            for image in jpegs(self.reader, plan):
                url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
                content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": request.prompt})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_new_tokens or self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "seed": int(digest([self.seed, request_identity(request)])[:8], 16) >> 1,
        }
        if self.config.repetition_penalty != 1.0:
            body["repetition_penalty"] = self.config.repetition_penalty
        reply = self._call("/chat/completions", body, stop)
        try:
            return str(reply["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError) as e:
            raise InputError(f"generation.endpoint: {self.base} answered without choices[0].message.content") from e

    def _call(self, path: str, body: dict[str, Any] | None, stop: threading.Event | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body is not None else None
        reason = ""
        for attempt in range(self.attempts):
            wait = self.backoff * 2**attempt
            try:
                call = urllib.request.Request(self.base + path, data, headers)
                with urllib.request.urlopen(call, timeout=self.timeout) as response:  # noqa: S310 - the user's own URL
                    return json.loads(response.read())
            except urllib.error.HTTPError as e:
                reason = f"HTTP {e.code}: {e.read(300).decode(errors='replace').strip() or e.reason}"
                if e.code not in RETRY_STATUS:
                    raise InputError(f"generation.endpoint: {self.base}{path} refuses ({reason})") from e
                wait = max(wait, _seconds(e.headers.get("Retry-After")))
            except (OSError, json.JSONDecodeError) as e:  # refused, reset, timed out, cut off
                reason = str(getattr(e, "reason", e)) or type(e).__name__
            except ValueError as e:
                raise InputError(f"generation.endpoint: {self.base!r} is not a URL ({e})") from e
            if attempt + 1 < self.attempts:
                _pause(wait, stop)
            if stop is not None and stop.is_set():
                break
        raise InputError(
            f"generation.endpoint: {self.base}{path} cannot be reached, {self.attempts} attempts ({reason})"
        )


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
