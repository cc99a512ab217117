"""Pictures in every mode and file format that Pillow can write, for comparing how they are read."""

import io
from itertools import product

import numpy as np
from PIL import Image

from vllm_msd.training.data.images import decode_image

MODES = ("RGB", "RGBA", "RGBX", "LA", "PA", "L", "P", "1", "I", "I;16", "F", "CMYK", "YCbCr",
         "LAB", "HSV", "La", "RGBa")  # fmt: skip
ORIENTATION = 274  # EXIF's number for it
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")


def pixels(mode: str, size: tuple[int, int] = (11, 7), seed: int = 0) -> Image.Image:
    """Noise in a mode, with all degrees of transparency where there is any. Size in pixels."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode in ("I", "F", "I;16"):
        values = rng.integers(0, 60_000, (height, width))
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray(values.astype(kind))
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode in ("PA", "LAB", "RGBX", "HSV", "CMYK", "La"):
        bands = len(Image.new(mode, (1, 1)).getbands())
        raw = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
        if mode == "PA":
            image = Image.new("PA", size)
            image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
            return image
        return Image.frombytes(mode, size, raw.tobytes())
    return rgba.convert(mode)


def encoded(image: Image.Image, file_format: str, **options) -> bytes | None:
    """The file, or None where the format has no such mode."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, file_format, **options)
    # Pillow says in many ways that a format does not hold a mode.
    except Exception:
        return None
    return buffer.getvalue()


def with_orientation(orientation: int, mode: str = "RGB", file_format: str = "JPEG") -> bytes:
    """A picture whose EXIF data says how it is to be turned."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(pixels(mode), file_format, exif=exif)


def every_file() -> dict[str, bytes]:
    """Files by name: each mode in each format, orientations, transparency, animations."""
    Image.init()
    found = {
        f"{file_format} of {mode}": encoded(pixels(mode), file_format)
        for file_format, mode in product(sorted(Image.SAVE), MODES)
        if file_format not in ("PDF", "PALM")
    }
    for orientation, (file_format, mode) in product(
        range(10), (("JPEG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGBA"), ("TIFF", "L"))
    ):
        name = f"{file_format} of {mode} with orientation {orientation}"
        found[name] = with_orientation(orientation, mode, file_format)
    for mode, colour in (
        ("L", 7),
        ("RGB", (1, 2, 3)),
        ("P", 5),
        ("P", bytes(range(256))),
        ("1", 1),
    ):
        image = pixels(mode)
        for file_format in ("PNG", "GIF"):
            name = f"{file_format} of {mode} with transparent {type(colour).__name__}"
            found[name] = encoded(image, file_format, transparency=colour)
    for file_format, mode in product(ANIMATED, ("RGB", "RGBA", "P")):
        frames = [pixels(mode, seed=seed) for seed in range(3)]
        name = f"moving {file_format} of {mode}"
        found[name] = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    return {name: content for name, content in found.items() if content}


def served(content: bytes) -> np.ndarray | None:
    """vLLM's pixels of a file, as a server gets them; None where it refuses the file."""
    from vllm.multimodal.media.image import ImageMediaIO

    try:
        return np.asarray(ImageMediaIO().load_bytes(content).media)
    except Exception:
        return None


def trained(content: bytes) -> np.ndarray | None:
    """Training's pixels of a file; None where it refuses the file."""
    try:
        image = decode_image(content)
    except Exception:
        return None
    return np.asarray(image)


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Whether both are the same pixels, or both refusals."""
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b))
