"""Reads classes of images: a folder for each class, whose name is the label.

pets/tabby_cat/1.jpg      label "tabby cat"
pets/tabby_cat/2.png
pets/beagle/1.jpg         label "beagle"
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from loraplex_training.errors import ExamplesError

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


class LabelledImages(NamedTuple):
    labels: Sequence[str]
    images: Sequence[tuple[Path, int]]  # the file, and the index of its label


def read_folder(folder: Path, labels: Sequence[str] | None = None) -> LabelledImages:
    """List the images of each class, in the order of their names.

    ``labels``: those that the folder must keep to. Raises ExamplesError.
    """
    if not folder.is_dir():
        raise ExamplesError(f"{folder} is not a folder; name one with a folder for each label")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    own = [path.name.replace("_", " ") for path in classes]
    if labels is None:
        labels = own
    if len(labels) < 2:
        raise ExamplesError(
            f"{folder} has {len(own)} folders of images, and at least 2 are needed: put the images "
            "of each class into a folder that is named like the class"
        )
    unknown = sorted({*own} - {*labels})
    if unknown:
        raise ExamplesError(
            f"{folder} has a class {unknown[0]!r} that was not trained; the classes are "
            f"{', '.join(labels)}"
        )
    images = []
    for label, path in zip(own, classes, strict=True):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _ENDINGS)
        if not files:
            raise ExamplesError(
                f"{path} has no image; images are files that end with {', '.join(_ENDINGS)}"
            )
        images += [(file, labels.index(label)) for file in files]
    return LabelledImages(labels, images)


def read_image(path: Path) -> Image.Image:
    """Return an image in RGB, turned as its EXIF says, as the server reads it.

    Raises ExamplesError.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ExamplesError(f"{path} cannot be read as an image: {error}") from error
