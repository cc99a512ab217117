"""Pictures of training data, with the pixels that vLLM hands its processor for the same file.

Turned upright by their EXIF orientation, transparency laid on white, then RGB; of an animation the
first frame. A test compares every mode and format with vLLM's own loading.
"""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps

from vllm_msd.training.data.records import BadRecordError

# What vLLM opens: formats that Pillow decodes in the process, without outside programs.
FORMATS = (
    "AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "GIF", "ICNS",
    "ICO", "IM", "IMT", "IPTC", "JPEG", "JPEG2000", "MCIDAS", "MSP", "PCD", "PCX", "PIXAR", "PNG",
    "PPM", "PSD", "QOI", "SGI", "SPIDER", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM", "XVTHUMB",
)  # fmt: skip
# vLLM's own limit, and its variable to raise it.
MAX_PIXELS = 178_956_970
MAX_PIXELS_VARIABLE = "VLLM_MAX_IMAGE_PIXELS"
_WHITE = (255, 255, 255)


def load_image(source: str, roots: list[Path]) -> Image.Image:
    """The picture of a record, in RGB.

    Args:
        source: a path, a ``file://`` address or a base64 data URL.
        roots: folders that relative paths are looked for in, in order.

    Raises:
        BadRecordError: there is no such file, or it is no picture that vLLM would serve.
    """
    content = _content(source, _short(source), roots)
    with _refusing(source):
        return decode_image(content)


def data_url(source: str, roots: list[Path]) -> str:
    """A record's picture as a base64 data URL, its file unchanged: an API decodes it as vLLM does.

    Args and raises as `load_image`, but that only the file's beginning is looked at.
    """
    content = _content(source, _short(source), roots)
    with _refusing(source), Image.open(BytesIO(content), formats=FORMATS) as image:
        kind = Image.MIME.get(image.format or "", "image/png")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _short(source: str) -> str:
    return source if len(source) <= 80 else source[:77] + "..."


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    try:
        yield
    # Pillow reports damage in many ways: SyntaxError for a broken PNG, struct.error, KeyError.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadRecordError(f"image {_short(source)} cannot be read: {reason}") from error


def decode_image(content: bytes) -> Image.Image:
    """The pixels of a picture's file, in RGB; raises whatever Pillow does for a damaged one."""
    image: Image.Image = Image.open(BytesIO(content), formats=FORMATS)
    limit = int(os.environ.get(MAX_PIXELS_VARIABLE, MAX_PIXELS))
    if 0 < limit < image.width * image.height:
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than {limit}; {MAX_PIXELS_VARIABLE} "
            "raises the limit, here and in vLLM"
        )
    with suppress(Exception):  # a picture with broken EXIF data stays as it lies
        image = ImageOps.exif_transpose(image)
    image.load()
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    laid = Image.new("RGB", image.size, _WHITE)
    laid.paste(image, mask=image.getchannel("A"))
    return laid


def _content(source: str, name: str, roots: list[Path]) -> bytes:
    """The file's bytes."""
    scheme = source.partition(":")[0].lower()
    if scheme == "data":
        return _decoded(source, name)
    if scheme in ("http", "https"):
        raise BadRecordError(f"image {name}: nothing is downloaded; give a path or a data URL")
    try:
        path = unquote(urlsplit(source).path) if scheme == "file" else source
        found = next((p for root in roots if (p := root / path).is_file()), None)
        if found is not None:
            return found.read_bytes()
    # A name that is too long, holds a null byte or cannot be encoded; a file without rights.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadRecordError(f"image {name} cannot be read: {reason}") from error
    raise BadRecordError(f"image {name}: there is no such file")


def _decoded(source: str, name: str) -> bytes:
    about, comma, data = source.partition(",")
    if not comma or not about.lower().endswith(";base64"):
        raise BadRecordError(f"image {name}: got a data URL of another kind, expected base64")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:  # binascii.Error, and text that is not ASCII
        raise BadRecordError(f"image {name}: its base64 is damaged: {error}") from error
