"""How the shapes world looks: one scene, one named object, and the mask of that object.

Everything is drawn at ``SUPERSAMPLE`` times the final size and averaged down, so that small images have soft edges.
Lengths are fractions of the image side; angles are radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLE = 2

# The hues that a label may name, and those that it never names (what an object wears when its label is no colour).
NAMED_COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 215, 50),
}
UNNAMED_COLORS: tuple[tuple[int, int, int], ...] = (
    (240, 140, 40),
    (130, 80, 50),
    (235, 130, 180),
    (150, 70, 170),
    (70, 190, 195),
    (150, 150, 150),
    (235, 235, 235),
)

# Every attribute sets one channel of an object's looks; two attributes of different kinds can be worn together.
ATTRIBUTE_KINDS: dict[str, str] = {
    "red": "color",
    "green": "color",
    "blue": "color",
    "yellow": "color",
    "striped": "texture",
    "dotted": "texture",
    "checkered": "texture",
    "outlined": "contour",
    "dashed": "contour",
    "glowing": "contour",
    "hollow": "fill",
    "shaded": "fill",
}


def _circle(count: int = 48) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> NDArray[np.float64]:
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2], axis=1) / 16


def _moon() -> NDArray[np.float64]:
    outer = np.linspace(0.30 * math.pi, 1.70 * math.pi, 36)
    inner = np.linspace(1.62 * math.pi, 0.38 * math.pi, 30)
    arcs = [
        np.stack([np.cos(outer), np.sin(outer)], axis=1),
        np.stack([0.42 + 0.83 * np.cos(inner), 0.86 * np.sin(inner)], axis=1),
    ]
    points: NDArray[np.float64] = np.concatenate(arcs) + np.array([0.2, 0.0])
    return points


def _fish() -> NDArray[np.float64]:
    t = np.linspace(-0.86 * math.pi, 0.86 * math.pi, 30)
    body = np.stack([-0.25 + 0.8 * np.cos(t), 0.58 * np.sin(t)], axis=1)
    tail = [[-1.25, 0.6], [-1.05, 0.0], [-1.25, -0.6]]
    points: NDArray[np.float64] = np.concatenate([body, tail]) * np.array([-1, 1])
    return points


def _cross() -> NDArray[np.float64]:
    arm = np.array([[-0.33, -1], [0.33, -1], [0.33, -0.33]])
    turned = arm[:, ::-1] * np.array([-1, 1])
    return np.concatenate([arm, turned, -arm, -turned])


OUTLINES: dict[str, NDArray[np.float64]] = {
    "arrow": np.array([[-1, -0.32], [0.1, -0.32], [0.1, -0.85], [1.05, 0], [0.1, 0.85], [0.1, 0.32], [-1, 0.32]]),
    "bolt": np.array([[0.25, -1.1], [-0.7, 0.2], [-0.1, 0.2], [-0.3, 1.1], [0.7, -0.25], [0.1, -0.25], [0.55, -1.1]]),
    "circle": 0.92 * _circle(),
    "cross": _cross(),
    "diamond": np.array([[0, -1.15], [0.75, 0], [0, 1.15], [-0.75, 0]]),
    "fish": _fish(),
    "heart": _heart(),
    "house": np.array([[-0.8, 0.9], [-0.8, -0.15], [0, -1.05], [0.8, -0.15], [0.8, 0.9]]),
    "moon": _moon(),
    "square": np.array([[-0.82, -0.82], [0.82, -0.82], [0.82, 0.82], [-0.82, 0.82]]),
    "star": _star(),
    "triangle": np.array([[0, -1.0], [1.0, 0.75], [-1.0, 0.75]]),
}

ATTRIBUTES: tuple[str, ...] = tuple(sorted(ATTRIBUTE_KINDS))
OBJECTS: tuple[str, ...] = tuple(sorted(OUTLINES))


@dataclass(frozen=True)
class Figure:
    """One drawn object: what it is, what it wears, where it stands."""

    obj: str
    attributes: tuple[str, ...]
    color: tuple[int, int, int]
    center: tuple[float, float]
    radius: float
    angle: float

    def wears(self, attribute: str) -> bool:
        return attribute in self.attributes


@dataclass(frozen=True)
class Scene:
    """A named figure (drawn last, never hidden) among smaller unnamed ones on a background."""

    named: Figure
    distractors: tuple[Figure, ...]
    clutter: float


def _jitter(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(color) * rng.uniform(0.85, 1.1) + rng.uniform(-12, 12, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def _base_color(attributes: tuple[str, ...], rng: np.random.Generator) -> tuple[int, int, int]:
    named = [NAMED_COLORS[name] for name in attributes if name in NAMED_COLORS]
    return _jitter(named[0] if named else UNNAMED_COLORS[rng.integers(len(UNNAMED_COLORS))], rng)


def compose(
    attribute: str,
    obj: str,
    rng: np.random.Generator,
    *,
    imbalance: float,
    companions: dict[str, tuple[str, ...]],
) -> Scene:
    """Choose everything that the label ``attribute obj`` leaves open.

    ``imbalance`` in [0, 1] is how much that is: 0 is one object, centred, on a plain ground; 1 is up to three
    distractors, full clutter, any place and size, and one time in two a second attribute that the label does not say.
    ``companions`` maps an object to the attributes that may be shown on it unsaid (training pairs, so that no unseen
    pair is ever shown without its name).
    """
    worn = [attribute]
    extras = [name for name in companions[obj] if ATTRIBUTE_KINDS[name] != ATTRIBUTE_KINDS[attribute]]
    if extras and rng.random() < imbalance / 2:
        worn.append(extras[rng.integers(len(extras))])
    radius = 0.30 + imbalance * rng.uniform(-0.07, 0.05)
    slack = imbalance * max(0.0, 0.5 - 1.05 * radius)
    named = Figure(
        obj=obj,
        attributes=tuple(worn),
        color=_base_color(tuple(worn), rng),
        center=(0.5 + rng.uniform(-slack, slack), 0.5 + rng.uniform(-slack, slack)),
        radius=radius,
        angle=imbalance * rng.uniform(-0.35, 0.35),
    )
    distractors = []
    for _ in range(rng.binomial(3, imbalance)):
        figure = _distractor(named, rng, companions)
        if figure is not None:
            distractors.append(figure)
    return Scene(named, tuple(distractors), clutter=imbalance)


def _distractor(named: Figure, rng: np.random.Generator, companions: dict[str, tuple[str, ...]]) -> Figure | None:
    obj = OBJECTS[rng.integers(len(OBJECTS))]
    worn = (companions[obj][rng.integers(len(companions[obj]))],)
    figure = Figure(obj, worn, _base_color(worn, rng), (0.0, 0.0), rng.uniform(0.08, 0.13), rng.uniform(-0.35, 0.35))
    for _ in range(8):
        center = (rng.uniform(0.06, 0.94), rng.uniform(0.06, 0.94))
        if math.dist(center, named.center) > named.radius + 0.8 * figure.radius:
            return replace(figure, center=center)
    return None


def render(scene: Scene, size: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw a scene: an RGB image and the mask (mode ``L``, 255 inside) of the named object, both ``size`` square."""
    side = size * SUPERSAMPLE
    canvas = _background(side, scene.clutter, rng)
    for figure in scene.distractors:
        _draw_figure(canvas, figure, rng)
    mask = _draw_figure(canvas, scene.named, rng)
    canvas += rng.normal(0, 3, (side, side, 1)).astype(np.float32)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX)
    return image, mask.resize((size, size), Image.Resampling.BOX).point(lambda value: 255 * (value >= 128))


def _background(side: int, clutter: float, rng: np.random.Generator) -> NDArray[np.float32]:
    corners = rng.uniform(70, 190, (2, 2, 1)) + rng.uniform(-25, 25, (2, 2, 3))
    ground = Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(ground)
    for _ in range(round(clutter * rng.integers(6, 16))):
        color = _jitter(UNNAMED_COLORS[rng.integers(len(UNNAMED_COLORS))], rng)
        x, y = rng.uniform(0, side, 2)
        length = rng.uniform(0.03, 0.16) * side
        if rng.random() < 0.5:
            angle = rng.uniform(0, math.pi)
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line([(x, y), end], fill=color, width=max(1, int(0.02 * side)))
        else:
            half = length / 4
            draw.ellipse([x - half, y - half, x + half, y + half], fill=color)
    return np.asarray(ground, dtype=np.float32).copy()


def _blend(canvas: NDArray[np.float32], mask: Image.Image, color: NDArray[np.float32], opacity: float = 1.0) -> None:
    weight = np.asarray(mask, dtype=np.float32)[..., None] * (opacity / 255)
    canvas += weight * (color - canvas)


def _draw_figure(whole: NDArray[np.float32], figure: Figure, rng: np.random.Generator) -> Image.Image:
    """Draw on ``whole`` in place and return the figure's full-size mask; works inside the figure's own box."""
    side = whole.shape[0]
    radius = figure.radius * side
    cx, cy = figure.center[0] * side, figure.center[1] * side
    reach = 1.6 * radius
    left, top = max(0, int(cx - reach)), max(0, int(cy - reach))
    right, bottom = min(side, int(cx + reach) + 1), min(side, int(cy + reach) + 1)
    canvas = whole[top:bottom, left:right]
    box = (right - left, bottom - top)

    cos, sin = math.cos(figure.angle), math.sin(figure.angle)
    turned = OUTLINES[figure.obj] @ np.array([[cos, sin], [-sin, cos]])
    path = [(float(x) * radius + cx - left, float(y) * radius + cy - top) for x, y in turned]
    mask = Image.new("L", box)
    ImageDraw.Draw(mask).polygon(path, fill=255)

    if figure.wears("glowing"):
        halo = _stroke(box, path, 0.34 * radius).filter(ImageFilter.GaussianBlur(0.17 * radius))
        _blend(canvas, halo.point(lambda value: min(255, 2 * value)), np.array([255, 250, 190], np.float32), 0.95)

    paint = _paint(figure, box, (cx - left, cy - top), radius, rng)
    inside = mask
    if figure.wears("hollow"):
        inside = Image.fromarray(np.minimum(np.asarray(_stroke(box, path, 0.44 * radius)), np.asarray(mask)))
    _blend(canvas, inside, paint)

    if figure.wears("outlined"):
        _blend(canvas, _stroke(box, path, 0.24 * radius), np.array([15, 15, 20], np.float32))
    if figure.wears("dashed"):
        _blend(canvas, _dashes(box, path, radius), np.array([15, 15, 20], np.float32))

    full = Image.new("L", (side, side))
    full.paste(mask, (left, top))
    return full


def _paint(
    figure: Figure, box: tuple[int, int], center: tuple[float, float], radius: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """The surface of a figure over its box: plain, shaded or patterned."""
    color = np.array(figure.color, np.float32)
    phase, turn = rng.uniform(0, 1, 2), rng.uniform(0, math.pi)
    ys, xs = np.mgrid[0 : box[1], 0 : box[0]].astype(np.float32)
    u = ((xs - center[0]) * math.cos(turn) + (ys - center[1]) * math.sin(turn)) / radius
    v = ((ys - center[1]) * math.cos(turn) - (xs - center[0]) * math.sin(turn)) / radius
    paint = np.broadcast_to(color, (*u.shape, 3)).copy()
    if figure.wears("shaded"):
        light = np.clip(0.5 + 0.6 * u, 0, 1)[..., None]
        paint = light * (0.35 * color + 165) + (1 - light) * (0.28 * color)
    contrast = np.array([250, 250, 250] if color.mean() < 150 else [35, 35, 45], np.float32)
    if figure.wears("striped"):
        pattern = (u / 0.5 + phase[0]) % 1 < 0.42
    elif figure.wears("dotted"):
        cell = 0.55
        pattern = np.hypot((u / cell + phase[0]) % 1 - 0.5, (v / cell + phase[1]) % 1 - 0.5) < 0.30
    elif figure.wears("checkered"):
        pattern = (np.floor(u / 0.42 + phase[0]) + np.floor(v / 0.42 + phase[1])) % 2 == 0
    else:
        return paint
    paint[pattern] = contrast
    return paint


def _stroke(box: tuple[int, int], path: list[tuple[float, float]], width: float) -> Image.Image:
    stroke = Image.new("L", box)
    closed = [*path, path[0], path[1]]
    ImageDraw.Draw(stroke).line(closed, fill=255, width=max(1, round(width)), joint="curve")
    return stroke


def _dashes(box: tuple[int, int], path: list[tuple[float, float]], radius: float) -> Image.Image:
    """Dashes of equal length along the closed path."""
    points = np.array([*path, path[0]])
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    count = 2 * max(4, round(along[-1] / (2 * 0.36 * radius)))
    dashes = Image.new("L", box)
    draw = ImageDraw.Draw(dashes)
    for dash in range(0, count, 2):
        at = np.linspace(dash, dash + 1, 5) * along[-1] / count
        piece = np.stack([np.interp(at, along, points[:, 0]), np.interp(at, along, points[:, 1])], axis=1)
        draw.line([(float(x), float(y)) for x, y in piece], fill=255, width=max(1, round(0.24 * radius)))
    return dashes
