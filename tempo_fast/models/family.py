"""What a family of video LLMs must say about itself.

Shapes: T tokens of the text sequence, G visual tokens, D hidden size, E channels of a visual feature, V vocabulary,
P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

# OpenAI CLIP's normalisation, which the processors of several families use
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Grid(NamedTuple):
    """Patches of one video in time, height and width (transformers' ``video_grid_thw``)."""

    t: int
    h: int
    w: int


class Timing(NamedTuple):
    """When the frames of a video are shown.

    ``seconds`` of each frame, ascending; ``fps`` at which they were sampled (frames over the seconds they stand for).
    """

    seconds: tuple[float, ...]
    fps: float


@dataclass(frozen=True)
class VideoGeometry:
    """How a family samples frames and cuts pixels: sizes in pixels, ``merge`` in patches, ``temporal`` in frames.

    ``sampling`` is the family's own rule of ``video.sampling.RULES``. Where ``side`` is set, every frame becomes a
    square of that side (``crop``: the shorter edge is resized to it and the middle cut out; else both edges are), the
    pixel budgets of the configuration have no say, and a frame is ``frame_tokens`` tokens.
    """

    patch: int
    merge: int
    temporal: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sampling: str = "qwen_vl_utils"
    side: int = 0
    crop: bool = False
    frame_tokens: int = 0

    @property
    def factor(self) -> int:
        """Height and width are multiples of this many pixels."""
        return self.side or self.patch * self.merge

    def grid(self, n_frames: int, height: int, width: int) -> Grid:
        """Grid of ``n_frames`` resized frames; the last frame fills up an incomplete temporal patch."""
        return Grid(-(-n_frames // self.temporal), height // self.patch, width // self.patch)

    def tokens(self, grid: Grid) -> int:
        """Language-model tokens of one video: the one count that text and pixels both use."""
        if self.side:
            return grid.t * self.frame_tokens
        return grid.t * grid.h * grid.w // self.merge**2

    def smallest(self) -> tuple[Grid, tuple[int, int]]:
        """The smallest video: its grid, and the shape of its pixels (see ``Family.encode_vision``)."""
        if self.side:
            return self.grid(1, self.side, self.side), (1, 3 * self.side**2)
        return Grid(1, self.merge, self.merge), (self.merge**2, 3 * self.temporal * self.patch**2)


@dataclass
class Prompt:
    """A tokenised prompt up to the point where the answer starts.

    ``input_ids`` [T] with one visual placeholder per visual token, ``position_ids`` [3, T] (M-RoPE axes t, h, w),
    ``visual`` [T] bool marks placeholders; ``grids`` of its videos in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    visual: Tensor
    grids: list[Grid] = field(default_factory=list)

    @property
    def next_position(self) -> int:
        """Where every branch starts: the largest prompt position over all axes, plus one."""
        return int(self.position_ids.max()) + 1


def unwrap(model: Any) -> Any:
    """The transformers model inside peft and engine wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module") and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


class Family(Protocol):
    """One instance per family; stateless. A ``model`` may stand inside peft and engine wrappers."""

    name: str
    lora_targets: str
    """Regular expression for peft: the linear layers of the language model, never vision, projector or head."""
    vision_lora_targets: str
    """The linear layers of the vision tower (SFT with ``vision_lora``)."""
    timed: bool
    """Whether the prompt or its positions say when frames are shown: ``build_prompt`` then needs ``times``."""

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        """The ``ForConditionalGeneration`` class from a local directory."""
        ...

    def geometry(self, config: Any) -> VideoGeometry:
        """From the model's transformers config."""
        ...

    def chat(self, tokenizer: Any, text: str, n_videos: int, turns: Sequence[tuple[str, str]] = ()) -> str:
        """The words of ``build_prompt`` by the checkpoint's chat template, a placeholder for each video."""
        ...

    def build_prompt(
        self,
        tokenizer: Any,
        config: Any,
        text: str,
        grids: Sequence[Grid],
        times: Sequence[Timing] | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        """Chat prompt: earlier (user, assistant) ``turns``, then ``text``, with the videos before the first user's
        words; generation prompt included.

        Raises InputError where the chat template does not show the videos, ValueError where ``times`` (one per video)
        do not fit or a ``timed`` family is given none.
        """
        ...

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        """Tokens of an answer, its end-of-turn token last."""
        ...

    def encode_vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """One vision call for all videos: pixel_values [P, C*t*p*p] -> features [G, E]. Where the geometry has a
        ``side`` a row is a whole frame, [F, C*side*side].

        The first D channels enter the language model; a family that also adds to deeper layers appends what it adds.
        """
        ...

    def embed(self, model: nn.Module, input_ids: Tensor, visual: Tensor, features: Tensor | None) -> Tensor:
        """input_ids [B, T], visual [B, T] bool, features [G, E] in reading order or None -> what enters the language
        model, [B, T, D]."""
        ...

    def hidden_states(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        visual: Tensor,
        features: Tensor | None,
        cache: Any | None = None,
    ) -> Tensor:
        """input_ids [B, T], position_ids [3, B, T], visual [B, T] bool, features [G, E] in reading order -> last hidden
        states [B, T, D], before the head.

        ``attention_mask``: additive or bool [B, 1, T, T], or None (causal). With a ``cache`` (``new_cache``) that holds
        C positions the T tokens come after them and are appended; the mask is then [B, C + T] of 1 and 0 (padding), or
        None.
        """
        ...

    def model_positions(self, position_ids: Tensor) -> Tensor:
        """Positions [3, B, T] as ``generate_model`` takes them: as they are, or [B, T] without M-RoPE."""
        ...

    def new_cache(self, model: nn.Module) -> Any:
        """An empty transformers ``Cache`` for ``hidden_states``."""
        ...

    def generate_model(self, model: nn.Module) -> Any:
        """What has transformers' ``generate``, continuing a filled cache from ``input_ids`` and ``position_ids``."""
        ...

    def head(self, model: nn.Module) -> nn.Module:
        """The vocabulary head (a linear layer, weight [V, D])."""
        ...

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The vision encoder with its projector: the same object at every call, an ``nn.ModuleList`` where these are
        several modules of the model."""
        ...
