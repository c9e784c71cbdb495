"""Images of requests: the formats that are read, and the clear refusals of all others."""

import base64
import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from loraplex_server.images import (
    ImageLimits,
    ImageRefused,
    check_count,
    decode_image,
    image_bytes,
    read_image,
)

_LIMITS = ImageLimits(max_bytes=20_000, max_pixels=10_000, max_images=4)


def _file(kind: str, size: tuple[int, int] = (6, 4), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 90)).save(file, kind, **options)
    return file.getvalue()


def _url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _refusal(data: bytes, limits: ImageLimits = _LIMITS) -> ImageRefused:
    with pytest.raises(ImageRefused) as refusal:
        decode_image(data, limits)
    return refusal.value


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_usual_formats_are_read_as_rgb(kind: str) -> None:
    image = decode_image(_file(kind), _LIMITS)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert max(abs(a - b) for a, b in zip(image.getpixel((2, 2)), (200, 30, 90), strict=True)) < 6


def test_a_data_url_and_bare_base64_are_the_same_image() -> None:
    data = _file("PNG")
    bare = base64.b64encode(data).decode()
    assert image_bytes(_url(data), _LIMITS) == image_bytes(bare, _LIMITS) == data
    with_charset = f"data:image/png;charset=utf-8;base64,{bare}"
    assert read_image(with_charset, _LIMITS).size == (6, 4)


def test_a_photo_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert decode_image(file.getvalue(), _LIMITS).size == (4, 6)


@pytest.mark.parametrize(
    "source", ["https://example.org/cat.png", "http://10.0.0.1/", "file:///etc/passwd", "s3://a/b"]
)
def test_no_url_is_fetched(source: str) -> None:
    with pytest.raises(ImageRefused, match="remote URL") as refusal:
        image_bytes(source, _LIMITS)
    assert refusal.value.code == "remote_image_refused"


@pytest.mark.parametrize("source", ["", "not base64!", "data:image/png,raw", "data:"])
def test_what_is_no_image_is_refused(source: str) -> None:
    with pytest.raises(ImageRefused) as refusal:
        read_image(source, _LIMITS)
    assert refusal.value.code == "invalid_image"


def test_many_pixels_are_refused_before_they_are_decoded() -> None:
    """A PNG of 1.6 GB in a few hundred bytes: only the header is read."""
    header = struct.pack(">IIBBBBB", 23_000, 23_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 70_000)))
    )
    refusal = _refusal(b"\x89PNG\r\n\x1a\n" + chunks)
    assert refusal.code == "image_too_large"
    assert "pixels" in str(refusal)
    assert "101 x 100 pixels" in str(_refusal(_file("PNG", (101, 100))))


def test_a_stripe_is_refused_since_processors_would_make_it_huge() -> None:
    assert "100 times" in str(_refusal(_file("PNG", (3, 301))))
    assert decode_image(_file("PNG", (300, 3)), _LIMITS).size == (300, 3)


def test_a_large_file_is_refused_before_its_base64_is_read() -> None:
    with pytest.raises(ImageRefused, match="more than the 20,000 of one image") as refusal:
        image_bytes("*" * 40_000, _LIMITS)
    assert refusal.value.code == "image_too_large"
    assert _refusal(b"\0" * 20_001).code == "image_too_large"


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    whole = _file("JPEG", progressive=True)
    bomb = whole[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 100 + whole[-2:]
    assert "scans" in str(_refusal(bomb))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 120, 250)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert "animation" in str(_refusal(file.getvalue()))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_a_broken_file_is_refused_wherever_it_breaks(kind: str) -> None:
    noise = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(0))
    file = io.BytesIO()
    Image.fromarray(noise.to(torch.uint8).numpy()).save(file, kind)
    data = file.getvalue()
    for length in (0, 3, 20, len(data) // 2, len(data) * 3 // 4):
        assert _refusal(data[:length]).code == "invalid_image", length


def test_a_request_has_a_limited_number_of_images() -> None:
    check_count(4, _LIMITS)
    with pytest.raises(ImageRefused, match="50 images are more than the 4") as refusal:
        check_count(50, _LIMITS)
    assert refusal.value.code == "too_many_images"
