"""Training and evaluation see the pixels that vLLM hands its processor, for every file it reads."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.parse import MultiModalDataParser

from tests.common import fuzz
from tests.common.pictures import every_file, same, served, trained
from vllm_msd.training.data.images import FORMATS, decode_image, load_image
from vllm_msd.training.data.records import BadRecordError

FILES = every_file()


def test_formats_are_those_of_vllm():
    assert set(FORMATS) == set(ALLOWED_IMAGE_FORMATS)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_vllm(name):
    wanted = served(FILES[name])
    assert same(trained(FILES[name]), wanted)
    if wanted is not None:  # and those of a picture given to an engine in Python
        image = Image.open(io.BytesIO(FILES[name]))
        items = MultiModalDataParser()._parse_image_data(image)
        assert np.array_equal(np.asarray(items.get(0)), wanted)


def test_the_files_are_of_many_kinds():
    """Most are read, some are refused; turning or laying on white changes what they look like."""
    read = [name for name in FILES if served(FILES[name]) is not None]
    assert len(read) > 100
    assert "JPEG of CMYK" in read and "TIFF of I;16" in FILES and "EPS of RGB" not in read
    plain = [np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB")) for name in read]
    changed = [n for n, p in zip(read, plain, strict=True) if not same(p, served(FILES[n]))]
    for kind in ("orientation 3", "orientation 6", "PNG of RGBA", "PNG of LA", "GIF of P with"):
        assert any(kind in name for name in changed), kind


def test_damaged_files_are_read_alike_or_by_neither():
    found = fuzz.damaged_pictures(100, 0)
    assert found["read"] and found["refused"]


def test_data_urls_are_those_of_vllm(tmp_path):
    content = FILES["PNG of RGBA"]
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    wanted = MediaConnector().fetch_image(url)
    assert np.array_equal(np.asarray(load_image(url, [])), np.asarray(wanted))
    (tmp_path / "a b.png").write_bytes(content)
    for path in ("a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png"):
        assert np.array_equal(np.asarray(load_image(path, [tmp_path])), np.asarray(wanted))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("data:image/png;base64,???", "base64 is damaged"),
        ("data:image/png;base64,\u00e9", "base64 is damaged"),
        ("data:image/png,abc", "expected base64"),
        ("data:image/png;base64", "expected base64"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read"),
        ("x" * 100_000, "cannot be read|no such file"),
        ("a\0b", "cannot be read|no such file"),
        ("https://example.com/a.png", "nothing is downloaded"),
        ("file://[", "cannot be read"),
        ("nowhere.png", "no such file"),
        (".", "no such file"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_picture_is_left_out(source, reason, tmp_path):
    with pytest.raises(BadRecordError, match=reason) as caught:
        load_image(source, [tmp_path])
    assert len(str(caught.value)) < 400


def test_too_many_pixels_are_left_out_as_vllm_leaves_them_out(monkeypatch):
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "70")
    assert served(FILES["PNG of RGB"]) is None
    with pytest.raises(ValueError, match="11 x 7 pixels, more than 70"):
        decode_image(FILES["PNG of RGB"])
