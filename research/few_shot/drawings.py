"""Drawings with labels: coloured shapes and some digits to pre-train on, others to learn."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 32  # pixels
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KNOWN = (*(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES), *DIGITS[:5])
"""The labels of pre-training."""
NEW = DIGITS[5:]


def drawing(label: str, rng: random.Random) -> Image.Image:
    """Return a drawing of a label of ``KNOWN`` or ``NEW``, at a random place on grey."""
    shade = rng.randrange(20, 110)
    image = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    pen = ImageDraw.Draw(image)
    if label in DIGITS:
        colour = COLOURS[rng.choice(tuple(COLOURS))]
        place = rng.randrange(6, 10), rng.randrange(-1, 3)
        font = ImageFont.load_default(rng.randrange(24, 28))
        pen.text(place, str(DIGITS.index(label)), fill=colour, font=font)
        return image
    name, _, shape = label.partition(" ")
    size = rng.randrange(12, 21)
    left, top = rng.randrange(2, SIDE - size - 1), rng.randrange(2, SIDE - size - 1)
    _draw(pen, shape, COLOURS[name], (left, top, left + size, top + size))
    return image


def write_folder(folder: Path, labels: Mapping[str, Sequence[str]], n: int, seed: int) -> Path:
    """Write ``n`` drawings of each label, as `loraplex train` reads them.

    ``labels``: label → what its drawings show in turn.
    """
    rng = random.Random(seed)
    for label, shown in labels.items():
        place = folder / label.replace(" ", "_")
        place.mkdir(parents=True)
        for i in range(n):
            drawing(shown[i % len(shown)], rng).save(place / f"{i:03}.png")
    return folder


def themselves(labels: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return labels whose drawings show what they name."""
    return {label: (label,) for label in labels}


def _draw(
    pen: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    box: tuple[int, int, int, int],
) -> None:
    left, top, right, bottom = box
    x, y, arm = (left + right) // 2, (top + bottom) // 2, (right - left) // 6
    match shape:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "ring":
            pen.ellipse(box, outline=colour, width=3)
        case "square":
            pen.rectangle(box, fill=colour)
        case "triangle":
            pen.polygon([(x, top), (left, bottom), (right, bottom)], fill=colour)
        case "bar":
            pen.rectangle((left, y - arm, right, y + arm), fill=colour)
        case "cross":
            pen.rectangle((left, y - arm, right, y + arm), fill=colour)
            pen.rectangle((x - arm, top, x + arm, bottom), fill=colour)
