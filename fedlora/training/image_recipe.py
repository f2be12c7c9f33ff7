"""What a checkpoint says of the images that it reads: `preprocessor_config.json`, as image processors save it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.data.images import CHANNELS, Frame
from fedlora.errors import ModelError

RECIPE = "preprocessor_config.json"
BILINEAR = 2
"""Pillow's number, and what transformers takes where a file names no filter."""
FILTERS = range(6)
"""Pillow's numbers of all of them."""

STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_reduce_labels")
"""What a file may switch on: done here, or (the last) nothing that happens to an image."""
OTHER_STEPS = ("crop_pct", "rescale_offset")
"""Words that mean a step of their own."""
OTHER_KINDS = ("ConvNext", "PoolFormer", "Levit", "ImageGPT", "Perceiver")
"""Processors with a step of their own that their files need not name."""
SHORTER_SIDE = ("CLIP", "ChineseCLIP", "Bit")
"""Processors to which a size that is one number is the shorter side's; to others it is a square's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """frame: the size. A model reads (byte * scale - mean) / std, mean and std by channel."""

    frame: Frame
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_recipe(directory: Path) -> Recipe:
    """How images become the inputs of the model in `directory`.

    Raises:
        ModelError: it does not say, or asks for what is not done here.
    """
    path = directory / RECIPE
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return _recipe(words)
    except OSError:
        raise ModelError(
            f"model.name: {str(directory)!r} holds no {RECIPE}, which says how large its images are; take an image "
            "classifier, or save its image processor there (`AutoImageProcessor.from_pretrained(...).save_pretrained`)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: {type(error).__name__}: {error}; need size, image_mean and image_std of three channels, as "
            "`save_pretrained` of an image processor writes them"
        ) from None


def _recipe(words: Mapping[str, Any]) -> Recipe:
    _require_known_steps(words)
    normalises = words.get("do_normalize", True)
    mean = tuple(map(float, words["image_mean"])) if normalises else (0.0,) * CHANNELS
    std = tuple(map(float, words["image_std"])) if normalises else (1.0,) * CHANNELS
    rescales = words.get("do_rescale", True)
    scale = float(words.get("rescale_factor", 1 / 255)) if rescales else 1.0
    finite = all(map(math.isfinite, (*mean, *std, scale)))
    if len(mean) != CHANNELS or len(std) != CHANNELS or not finite or min(*std, scale) <= 0:
        raise ValueError(f"image_mean {mean}, image_std {std} and rescale_factor {scale}")
    return Recipe(frame=_frame(words), scale=scale, mean=mean, std=std)


def _frame(words: Mapping[str, Any]) -> Frame:
    size = words["size"]
    if not isinstance(size, Mapping) and _kind(words).startswith(SHORTER_SIDE):
        size = {"shortest_edge": size}
    resize = _shorter_side(size) if "shortest_edge" in _named(size) else _pair(size)
    crops = words.get("do_center_crop", False)
    if isinstance(resize, int) and not crops:
        raise ValueError(f"size {size} leaves images of unequal shape, for do_center_crop is off")
    height, width = _pair(words["crop_size"]) if crops else _pair(size)
    if min(height, width) < 1:
        raise ValueError(f"{height} x {width} pixels")
    resample = int(words.get("resample", BILINEAR))
    if resample not in FILTERS:
        raise ValueError(f"resample {resample}, no filter of Pillow's")
    return Frame(
        height=height,
        width=width,
        resize=resize if words.get("do_resize", True) else None,
        resample=resample,
    )


def _require_known_steps(words: Mapping[str, Any]) -> None:
    on = {name for name, value in words.items() if value}
    other = {name for name in on if name.startswith("do_")} - {*STEPS} | on & {*OTHER_STEPS}
    kind = _kind(words)
    if other or kind.startswith(OTHER_KINDS):
        steps = ", ".join(sorted(other)) or "a step of its own"
        raise ValueError(f"{kind or 'this image processor'} has {steps}, which is not done here")


def _kind(words: Mapping[str, Any]) -> str:
    """The processor's class, by either of its names; empty if the file tells none."""
    return str(words.get("image_processor_type") or words.get("feature_extractor_type") or "")


def _named(size: object) -> Mapping[str, Any]:
    return size if isinstance(size, Mapping) else {}


def _shorter_side(size: Mapping[str, Any]) -> int:
    if "longest_edge" in size:
        raise ValueError(f"size {dict(size)} bounds both edges")
    return int(size["shortest_edge"])


def _pair(size: Any) -> tuple[int, int]:
    """(height, width); a number is a square's side, as older files have it."""
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))
