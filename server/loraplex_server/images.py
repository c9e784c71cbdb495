"""Reads the images of requests: ``data:`` URLs, base64, uploads and allowed addresses, in limits.

    image = read_image(source, ImageLimits())  # a PIL image in RGB

The header is checked before any pixel is decoded, so that a small file cannot ask for much memory.
Call these functions on a thread: decoding takes milliseconds and holds no lock of Python.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from loraplex_adapter_store.errors import LimitExceeded, SourceError
from loraplex_adapter_store.sources.prefix import SourcePrefix, canonical_uri
from loraplex_adapter_store.sources.uri import read_web

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?:;[\w=.+-]+)*?(?P<base64>;base64)?,", re.I)
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SCAN = b"\xff\xda"  # begins a scan of a JPEG; a progressive JPEG has about ten
_MAX_SCANS = 64
_MAX_RATIO = 100  # of the sides: processors that resize the shorter one make the other huge
_FETCH_S = 10.0  # for the whole file of a remote image
_SHOWN = 40  # characters of a source in errors


class ImageLimits(NamedTuple):
    """The limits of one image, and of the images of one request."""

    max_bytes: int = 10 << 20  # of the file
    max_pixels: int = 16 << 20  # width times height
    max_images: int = 32  # of a request
    remote: tuple[SourcePrefix, ...] = ()  # web addresses below which images are fetched


class ImageRefused(ValueError):
    """An image that is not read. The message says why, ``code`` is the error code of the API."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def is_image_url(text: str) -> bool:
    """Return True for a ``data:`` URL of an image."""
    return text[:11].lower() == "data:image/"


def check_count(n_images: int, limits: ImageLimits) -> None:
    """Raises ImageRefused if a request has too many images."""
    if n_images > limits.max_images:
        raise ImageRefused(
            f"{n_images} images are more than the {limits.max_images} of one request",
            "too_many_images",
        )


def read_image(source: str, limits: ImageLimits) -> Image.Image:
    """Return the image of a ``data:`` URL or of base64. Raises ImageRefused."""
    return decode_image(image_bytes(source, limits), limits)


def image_bytes(source: str | Path, limits: ImageLimits) -> bytes:
    """Return the file of a ``data:`` URL, base64, allowed address or upload. Raises ImageRefused.

    ``source``: a path is that of an upload; a text of a client is never read as a path.
    """
    if isinstance(source, Path):
        return _stored(source, limits)
    if _REMOTE.match(source):
        return _fetched(source, limits)
    start = 0
    if source[:5].lower() == "data:":
        head = _DATA_URL.match(source[:200])
        if head is None or head["base64"] is None:
            raise ImageRefused(
                f"{_start_of(source)} is not a data: URL in base64 (data:image/png;base64,…)",
                "invalid_image",
            )
        start = head.end()
    _check_size((len(source) - start) * 3 // 4 - 2, limits)  # before the bytes are copied
    try:
        data = base64.b64decode(source[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageRefused(f"the image is not base64: {error}", "invalid_image") from error
    _check_size(len(data), limits)
    return data


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode a file and return its image in RGB, turned as its EXIF says. Raises ImageRefused.

    Transparency is dropped, as transformers does. Animations are refused.
    """
    _check_size(len(data), limits)
    if data.startswith(b"\xff\xd8") and data.count(_SCAN) > _MAX_SCANS:
        raise ImageRefused(
            f"the JPEG has {data.count(_SCAN)} scans, at most {_MAX_SCANS} are decoded",
            "image_too_large",
        )
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_header(image, limits)
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except ImageRefused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused(
            f"the image has more than {limits.max_pixels:,} pixels; make it smaller",
            "image_too_large",
        ) from error
    except UnidentifiedImageError as error:
        raise ImageRefused(
            f"the {len(data):,} bytes are no image in {', '.join(_FORMATS)}", "invalid_image"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many types for broken files
        reason = str(error) or type(error).__name__
        raise ImageRefused(
            f"the image is broken and cannot be decoded: {reason[:200]}", "invalid_image"
        ) from error


def media_type(data: bytes) -> str:
    """Return the media type of a file that ``decode_image`` has decoded, such as image/png."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        kind = image.format or ""
    return "image/jpeg" if kind == "MPO" else Image.MIME[kind]


def _stored(path: Path, limits: ImageLimits) -> bytes:
    """Return the file of an upload. Raises ImageRefused."""
    try:
        _check_size(path.stat().st_size, limits)
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageRefused("the uploaded file was deleted meanwhile", "invalid_image") from None


def _fetched(source: str, limits: ImageLimits) -> bytes:
    """Return the file of an allowed address. Waits for its server for at most ``_FETCH_S``."""
    try:
        address = canonical_uri(source)
    except SourceError:
        address = ""
    if not any(prefix.covers(address) for prefix in limits.remote):
        allowed = (
            f"; only plain addresses below {limits.remote[0].text} are" if limits.remote else ""
        )
        raise ImageRefused(
            f"{_start_of(source)} is a remote URL, which this server does not fetch{allowed}. Send "
            "the image as a data: URL, or start the server with --allow-image-url",
            "remote_image_refused",
        )
    try:
        return read_web(address, max_bytes=limits.max_bytes, timeout_s=_FETCH_S)
    except LimitExceeded as error:
        raise ImageRefused(f"the image at {error}", "image_too_large") from None
    except SourceError as error:
        raise ImageRefused(str(error), "remote_image_unreadable") from None


def _check_size(n_bytes: int, limits: ImageLimits) -> None:
    if n_bytes > limits.max_bytes:
        raise ImageRefused(
            f"the image has {n_bytes:,} bytes, more than the {limits.max_bytes:,} of one image",
            "image_too_large",
        )


def _check_header(image: Image.Image, limits: ImageLimits) -> None:
    """Raises ImageRefused for too many pixels, for stripes and for animations."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageRefused(
            f"the image has {width:,} x {height:,} pixels, more than {limits.max_pixels:,}; make "
            "it smaller",
            "image_too_large",
        )
    if max(width, height) > _MAX_RATIO * min(width, height):
        raise ImageRefused(
            f"the image has {width:,} x {height:,} pixels; one side may have at most {_MAX_RATIO} "
            "times as many as the other",
            "invalid_image",
        )
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageRefused(
            f"the {image.format} is an animation; send one frame as an image", "invalid_image"
        )


def _start_of(source: str) -> str:
    return repr(source if len(source) <= _SHOWN else f"{source[:_SHOWN]}…")
