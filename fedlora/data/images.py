"""An image as a row of bytes: decoded, in the size that a model reads, channel by channel.

So an image is a record like any other: it is dealt out, kept, drawn and fingerprinted as the tokens of a text are.
"""

import importlib
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.records import Examples, Records
from fedlora.data.texts import Picture
from fedlora.errors import DataError

CHANNELS = 3
"""Red, green, blue; whatever a file holds is turned into these."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is opened. Pillow knows more, but it has other programs run some of them: Ghostscript for PostScript."""

EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
"""Pillow's modes that a byte a channel holds; it cuts off what wider ones have above 255."""

TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""How a camera was held, by EXIF, and the number of Pillow's transposition that puts its image upright."""
ORIENTATION = 0x0112
"""EXIF's tag of it."""

MOST_PIXELS = 89_478_485
"""Of a file, from where on Pillow warns of a bomb, and of what it is resized to: 268 MB at three bytes each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The size that a model reads, in pixels, and the way there.

    height, width: of what is left. resize: (height, width) first, whatever the shape was; or of the shorter side alone,
    the shape kept; None: not at all. What is then larger loses its rim, what is smaller gets a black one.
    resample: Pillow's number of the filter.
    """

    height: int
    width: int
    resize: tuple[int, int] | int | None
    resample: int

    @property
    def numbers(self) -> int:
        """Bytes of one image."""
        return CHANNELS * self.height * self.width


def images_of(records: Records, frame: Frame) -> Examples:
    """Every image as a row of `frame.numbers` bytes, in the order of the records.

    Raises:
        DataError: FILE:ROW of the first that is no image, and the mend; or Pillow is not installed.
    """
    rows = np.empty((len(records), frame.numbers), dtype=np.uint8)
    for row, picture in zip(rows, records.texts, strict=True):
        assert isinstance(picture, Picture), "config/columns.py lets image-classification read images alone"
        row[:] = decoded(picture, frame).reshape(-1)
    return Examples(
        input_ids=rows.reshape(-1),
        offsets=np.arange(len(records) + 1, dtype=np.int64) * frame.numbers,
        labels=records.labels,
    )


def decoded(picture: Picture, frame: Frame) -> NDArray[np.uint8]:
    """(3, height, width), upright; of an animation the first image.

    Raises:
        DataError: it is no image of `FORMATS`, has more than `MOST_PIXELS` or more than 8 bits a channel, or Pillow is
            not installed.
    """
    pillow: Any = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their words are of a record
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(BytesIO(picture.encoded()), formats=FORMATS) as opened:
                image = _resized(_upright(opened, picture.where).convert("RGB"), frame, picture.where)
    except DataError:
        raise
    except Exception as error:
        # Of a dozen decoders, each with exceptions of its own kind, whose words can quote the file.
        raise DataError(
            f"{picture.where} is no image that can be read ({type(error).__name__}); save it again as PNG or JPEG, or "
            "drop the row"
        ) from None
    left, top = (image.width - frame.width) // 2, (image.height - frame.height) // 2
    if (left, top) != (0, 0) or image.size != (frame.width, frame.height):
        image = image.crop((left, top, left + frame.width, top + frame.height))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _upright(image: Any, where: str) -> Any:
    if image.mode not in EIGHT_BIT:
        raise DataError(
            f"{where} is an image of more than 8 bits a channel (Pillow's mode {image.mode}), which would be cut off, "
            "not scaled; save it with 8"
        )
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _resized(image: Any, frame: Frame, where: str) -> Any:
    if frame.resize is None:
        return image
    if isinstance(frame.resize, int):
        short, long = min(image.size), max(image.size)
        other = int(frame.resize * long / short)
        size = (other, frame.resize) if image.width > image.height else (frame.resize, other)
    else:
        size = frame.resize[1], frame.resize[0]
    if size[0] * size[1] > MOST_PIXELS:
        raise DataError(
            f"{where} is an image so long and narrow that, its shorter side resized to {frame.resize}, it would have "
            f"more than {MOST_PIXELS} pixels; cut it, or drop the row"
        )
    return image.resize(size, resample=frame.resample)


def _pillow() -> Any:
    """Pillow, which only a run on images loads."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise DataError(
            "images are decoded by Pillow, which is not installed; pip install 'fedlora[images]'"
        ) from None
