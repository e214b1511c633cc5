"""What happens in a tinyworld video: colours, shapes, actions, scenes, and the plan of one film.

A film is a list of clips; a clip shows one event in one scene, in one shot or in two (the second a close-up of the
same event). Plans are pure data drawn from (seed, split, index); `render.py` turns them into pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

FPS = 12
SAMPLE_FPS = 4
WIDTH = 112
HEIGHT = 112
PORTRAIT_HEIGHT = 168
CELL = 28  # a background cell is one vision patch once frames are halved
MAX_SHOTS = 32
MAX_RUNS = 3

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "green": (40, 195, 60),
    "blue": (40, 85, 240),
    "yellow": (240, 225, 40),
    "white": (245, 245, 245),
    "purple": (165, 45, 205),
    "orange": (245, 135, 15),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
# action -> (third person, bare verb)
ACTIONS: dict[str, tuple[str, str]] = {
    "left": ("moves left", "move left"),
    "right": ("moves right", "move right"),
    "up": ("moves up", "move up"),
    "down": ("moves down", "move down"),
    "grow": ("grows", "grow"),
    "shrink": ("shrinks", "shrink"),
    "appear": ("appears", "appear"),
    "disappear": ("disappears", "disappear"),
}
DIRECTIONS = ("left", "right", "up", "down")
PATTERNS = ("checker", "columns", "rows", "diagonal")


@dataclass(frozen=True)
class Tone:
    """A background tone in OpenCV's HSV units (hue 0..179, the others 0..255)."""

    hue: int
    saturation: int
    value: int


@dataclass(frozen=True)
class Scene:
    """A place: two tones in a pattern. `view` 0 and 1 swap the tones: the same histogram, yet a hard cut."""

    name: str
    dark: Tone
    light: Tone
    pattern: str


def _scenes() -> tuple[Scene, ...]:
    # (dark hue, light hue) in degrees: no two scenes share both, so histograms stay apart
    pairs = [
        (0, 30), (30, 90), (60, 200), (90, 150), (120, 270), (150, 60), (180, 330),
        (210, 180), (240, 120), (270, 0), (300, 210), (330, 300), (0, 180), (60, 330),
    ]  # fmt: skip
    scenes = []
    for i, (dark, light) in enumerate(pairs):
        scenes.append(
            Scene(
                name=f"scene_{i:02d}",
                dark=Tone(dark // 2, 150, 60),
                light=Tone(light // 2, 110, 160),
                pattern=PATTERNS[i % len(PATTERNS)],
            )
        )
    return tuple(scenes)


SCENES: tuple[Scene, ...] = _scenes()


def light_mask(pattern: str, view: int, height: int, width: int) -> np.ndarray:
    """Bool[height, width]: where the scene's light tone goes."""
    y, x = np.mgrid[0:height, 0:width]
    index = {
        "checker": x // CELL + y // CELL,
        "columns": x // CELL,
        "rows": y // CELL,
        "diagonal": (x + y) // CELL,
    }[pattern]
    return (index + view) % 2 == 1


@lru_cache(maxsize=1)
def cut_strength() -> np.ndarray:
    """Float[2S, 2S]: mean HSV change between backgrounds (index 2 * scene + view), the content detector's measure."""
    views = []
    for scene in SCENES:
        for view in (0, 1):
            mask = light_mask(scene.pattern, view, HEIGHT, WIDTH)[..., None]
            light = np.array([scene.light.hue, scene.light.saturation, scene.light.value], np.float32)
            dark = np.array([scene.dark.hue, scene.dark.saturation, scene.dark.value], np.float32)
            views.append(np.where(mask, light, dark)[::2, ::2].reshape(-1))
    stack = np.stack(views)
    return np.abs(stack[:, None] - stack[None]).mean(-1)


MIN_CUT = 38.0  # the usual content threshold is 27; objects and compression take a share


@dataclass(frozen=True)
class Event:
    """One thing that happens: an object and what it does."""

    colour: str
    shape: str
    action: str

    @property
    def text(self) -> str:
        """The caption of this event alone: `A red circle moves left.`"""
        article = "An" if self.colour[0] in "aeiou" else "A"
        return f"{article} {self.colour} {self.shape} {ACTIONS[self.action][0]}."

    @property
    def subject(self) -> str:
        """`the red circle`"""
        return f"the {self.colour} {self.shape}"


@dataclass(frozen=True)
class Shot:
    """A camera take: `x`, `y` (0..1) is the object's home, `reach` its travel, `turn` when it (dis)appears."""

    n_frames: int
    view: int
    scale: float
    x: float
    y: float
    reach: float
    turn: float


@dataclass(frozen=True)
class Clip:
    """Consecutive shots of one scene showing one event."""

    scene: int
    event: Event
    shots: tuple[Shot, ...]

    @property
    def n_frames(self) -> int:
        return sum(shot.n_frames for shot in self.shots)


@dataclass(frozen=True)
class Film:
    """The plan of one video."""

    clips: tuple[Clip, ...]
    width: int = WIDTH
    height: int = HEIGHT
    variant: str = "plain"

    @property
    def n_frames(self) -> int:
        return sum(clip.n_frames for clip in self.clips)

    @property
    def description(self) -> str:
        """All events in order, joined by one space."""
        return " ".join(clip.event.text for clip in self.clips)

    @property
    def clip_spans(self) -> list[tuple[int, int]]:
        """[start, end) in frames of every clip."""
        return _spans([clip.n_frames for clip in self.clips])

    @property
    def shot_spans(self) -> list[tuple[int, int]]:
        """[start, end) in frames of every shot."""
        return _spans([shot.n_frames for clip in self.clips for shot in clip.shots])


def _spans(lengths: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths).tolist()
    return [(end - n, end) for n, end in zip(lengths, ends, strict=True)]


def draw_events(rng: np.random.Generator, n: int) -> list[Event]:
    """n events with different objects, so that every question has one answer."""
    colours, actions = list(COLOURS), list(ACTIONS)
    objects = rng.permutation(len(colours) * len(SHAPES))[:n]
    return [
        Event(colours[int(o) // len(SHAPES)], SHAPES[int(o) % len(SHAPES)], actions[int(rng.integers(len(actions)))])
        for o in objects
    ]


SHOT_FRAMES = (15, 18, 21, 24)


def draw_film(rng: np.random.Generator, n_clips: int, variant: str = "plain", two_shots: float = 0.2) -> Film:
    """Draw a film of `n_clips` clips: scenes recur apart from each other, every cut is strong enough to be found."""
    height = PORTRAIT_HEIGHT if variant == "portrait" else HEIGHT
    strength = cut_strength()
    runs = np.zeros(len(SCENES), int)
    max_runs = max(1, min(MAX_RUNS, n_clips // 3))
    spare = MAX_SHOTS - n_clips
    clips: list[Clip] = []
    last = -1
    for event in draw_events(rng, n_clips):
        options = [
            2 * s + v
            for s in range(len(SCENES))
            for v in (0, 1)
            if runs[s] < max_runs and (last < 0 or (s != last // 2 and strength[last, 2 * s + v] >= MIN_CUT))
        ]
        last = int(options[int(rng.integers(len(options)))])
        runs[last // 2] += 1
        n_shots = 2 if spare > 0 and rng.random() < two_shots else 1
        spare -= n_shots - 1
        shots = []
        for k in range(n_shots):
            frames = SHOT_FRAMES[0] if n_shots == 2 else int(rng.choice(SHOT_FRAMES, p=(0.45, 0.3, 0.15, 0.1)))
            view = (last + k) % 2
            # an object that springs up too large would look like a cut
            close = 1.1 if event.action in ("appear", "disappear") else 1.3
            shots.append(draw_shot(rng, frames, view, close if k else 1.0))
        last = 2 * (last // 2) + shots[-1].view
        clips.append(Clip(scene=last // 2, event=event, shots=tuple(shots)))
    return Film(tuple(clips), WIDTH, height, variant)


def draw_shot(rng: np.random.Generator, n_frames: int, view: int, scale: float) -> Shot:
    """A take with its home, reach and turning point drawn."""
    return Shot(
        n_frames=n_frames,
        view=view,
        scale=scale * float(rng.uniform(0.92, 1.08)),
        x=float(rng.uniform(0.4, 0.6)),
        y=float(rng.uniform(0.4, 0.6)),
        reach=float(rng.uniform(0.85, 1.1)),
        turn=float(rng.uniform(0.46, 0.54)),
    )


def stream(*key: int) -> np.random.Generator:
    """A generator of its own for every key, so that videos do not depend on each other."""
    return np.random.default_rng(list(key))


SPLITS = {"train": 1, "heldout": 2}
VARIANTS = ("plain", "portrait", "vfr", "audio")


def film_of(seed: int, split: str, index: int) -> Film:
    """The film of a split at an index: three in four are long (16..24 clips), the others 5..12."""
    rng = stream(seed, SPLITS[split], index)
    n_clips = int(rng.integers(16, 25)) if index % 4 != 3 else int(rng.integers(5, 13))
    variant = str(rng.choice(VARIANTS, p=(0.7, 0.1, 0.1, 0.1)))
    return draw_film(rng, n_clips, variant)
