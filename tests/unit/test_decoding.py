"""Images decoded: every kind becomes grey or colour, and what has no pixels is refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proxyrob.errors import DataIntegrityError
from proxyrob.source import open_images
from proxyrob.source.encoded import decode_image


def _encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


GREY = np.array([[0, 128], [200, 255]], np.uint8)
COLOUR = np.array([[[10, 20, 30], [40, 50, 60]], [[255, 0, 0], [0, 0, 255]]], np.uint8)
SOLID = np.full((2, 2), 255, np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.fromarray(GREY), GREY[..., None], id="grey"),
        pytest.param(Image.fromarray(COLOUR), COLOUR, id="colour"),
        pytest.param(Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY[..., None], id="grey-16-bit"),
        pytest.param(Image.fromarray(np.dstack([COLOUR, GREY])), COLOUR, id="transparent-colour"),
        pytest.param(Image.fromarray(np.dstack([GREY, SOLID])), GREY[..., None], id="transparent-grey"),
        pytest.param(Image.fromarray(COLOUR).quantize(4), COLOUR, id="palette"),
        pytest.param(Image.fromarray(GREY > 127), np.uint8(255) * (GREY > 127)[..., None], id="one-bit"),
    ],
)
def test_every_kind_of_image_becomes_grey_or_colour(image: Image.Image, expected: np.ndarray) -> None:
    """Sixteen bits keep the upper eight, transparency is dropped, palettes become colour."""
    assert np.array_equal(decode_image(_encoded(image), "a"), expected)


def test_transparency_in_a_palette_is_dropped() -> None:
    """A transparent colour of a palette is that colour, without a warning."""
    image = Image.fromarray(COLOUR).quantize(4)
    image.info["transparency"] = bytes([0, 255, 255, 255])
    assert np.array_equal(decode_image(_encoded(image), "a"), COLOUR)


def test_the_shape_decides_the_channels(tmp_path: Path) -> None:
    """Asked for three channels a grey image becomes colour, asked for one a colour image becomes grey."""
    (tmp_path / "0.png").write_bytes(_encoded(Image.fromarray(GREY)))
    (tmp_path / "1.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    colour = np.concatenate([images for images, _ in open_images(tmp_path, image_shape=(2, 2, 3)).read()])
    assert np.array_equal(colour, np.stack([np.dstack([GREY] * 3), COLOUR]))
    grey = np.concatenate([images for images, _ in open_images(tmp_path, image_shape=(2, 2, 1)).read()])
    assert np.array_equal(grey[0, ..., 0], GREY)
    assert grey.shape == (2, 2, 2, 1)


def test_grey_among_colour_becomes_colour_and_colour_among_grey_is_refused(tmp_path: Path) -> None:
    """The first image decides; no image loses its colours unasked."""
    (tmp_path / "0.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    (tmp_path / "1.png").write_bytes(_encoded(Image.fromarray(GREY)))
    images = np.concatenate([images for images, _ in open_images(tmp_path).read()])
    assert np.array_equal(images[1], np.dstack([GREY] * 3))
    (tmp_path / "2.png").write_bytes(_encoded(Image.fromarray(COLOUR)))
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataIntegrityError, match=r"2\.png \(row 1 of .*is a colour image, but the first one is grey; say how"):
        list(open_images(tmp_path).read())


def test_levels_that_are_no_pixels_are_refused() -> None:
    """Floating-point levels have no range that could be known."""
    image = Image.fromarray(np.zeros((2, 2), np.float32))
    with pytest.raises(DataIntegrityError, match="here has floating-point levels, expected integers"):
        decode_image(_encoded(image, "TIFF"), "here")
