"""An image as a row of bytes: decoded, in the size that a model reads, channel by channel.

So an image is a record like any other: it is dealt out, kept, drawn and fingerprinted as the tokens of a text are.
"""

import importlib
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
    """(3, height, width).

    Raises:
        DataError: it is no image that Pillow reads, or Pillow is not installed.
    """
    pillow: Any = _pillow()
    try:
        with pillow.open(BytesIO(picture.encoded())) as opened:
            image = _resized(opened.convert("RGB"), frame)
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"{picture.where} is no image that can be read ({type(error).__name__}); save it again as PNG or JPEG, or "
            "drop the row"
        ) from None
    left, top = (image.width - frame.width) // 2, (image.height - frame.height) // 2
    if (left, top) != (0, 0) or image.size != (frame.width, frame.height):
        image = image.crop((left, top, left + frame.width, top + frame.height))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _resized(image: Any, frame: Frame) -> Any:
    if frame.resize is None:
        return image
    if isinstance(frame.resize, int):
        short, long = min(image.size), max(image.size)
        other = int(frame.resize * long / short)
        size = (other, frame.resize) if image.width > image.height else (frame.resize, other)
    else:
        size = frame.resize[1], frame.resize[0]
    return image.resize(size, resample=frame.resample)


def _pillow() -> Any:
    """Pillow, which only a run on images loads."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise DataError(
            "images are decoded by Pillow, which is not installed; pip install 'fedlora[images]'"
        ) from None
