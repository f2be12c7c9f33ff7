"""The intake of an image model: rows of bytes, as pixels around zero."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from fedlora.data.images import CHANNELS
from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.training.hearing import hear
from fedlora.training.image_recipe import RECIPE, Recipe, load_recipe

MADE_UP, PUBLIC = 3, 16
"""Images of a probe; and of what shows a model's layers their common input, thousands of patches at the usual size."""
BLOTS = 4
"""A public image is this many random colours to a side, blurred into each other: light and shade without a thing."""
SEED = 0
"""Fixed: made-up images are constants of the size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelIntake:
    """directory: where the model lies. tokens: of an image in the model's layers, such as its patches and one more."""

    directory: Path
    recipe: Recipe
    tokens: int
    keeps_states: ClassVar[bool] = False

    def most_tokens(self, max_length: int | None) -> int:
        """Tokens of an image; every image has as many."""
        return self.tokens

    def footprints(self, examples: Examples) -> NDArray[np.int64]:
        """Tokens of an image; every image has as many."""
        return np.full(len(examples), self.tokens, dtype=np.int64)

    def collate(self, examples: Examples, device: torch.device) -> dict[str, Tensor]:
        """images (n, 3, height, width) uint8, and labels (n,) if there are any."""
        frame = self.recipe.frame
        shape = len(examples), CHANNELS, frame.height, frame.width
        batch = {"images": torch.from_numpy(examples.input_ids).view(shape)}
        if examples.labels is not None:
            batch["labels"] = torch.from_numpy(examples.labels)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def inputs(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """pixel_values (n, 3, height, width) in the model's type, computed in float32 as image processors do."""
        return {"pixel_values": pixel_values(batch["images"], self.recipe).to(model.dtype)}

    def made_up(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Images of noise."""
        return self.inputs(model, {"images": _noise(MADE_UP, self.recipe)})

    def public(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Images of soft blots of colour."""
        frame = self.recipe.frame
        draw = torch.Generator().manual_seed(SEED)
        colours = torch.rand((PUBLIC, CHANNELS, BLOTS, BLOTS), generator=draw) * 255
        soft = interpolate(colours, size=(frame.height, frame.width), mode="bilinear", align_corners=False)
        return self.inputs(model, {"images": soft.round().to(torch.uint8)})

    def blank(self, count: int, numbers: int) -> Examples:
        """Black."""
        each = self.recipe.frame.numbers
        offsets = np.arange(count + 1, dtype=np.int64) * each
        return Examples(input_ids=np.zeros(count * each, dtype=np.uint8), offsets=offsets)

    def save(self, directory: Path) -> None:
        """The image processor's file."""
        shutil.copyfile(self.directory / RECIPE, directory / RECIPE)


def pixel_values(images: Tensor, recipe: Recipe) -> Tensor:
    """(byte * scale - mean) / std, float32, of images (n, 3, height, width) uint8."""
    mean, std = (images.new_tensor(each, dtype=torch.float32) for each in (recipe.mean, recipe.std))
    return (images.float() * recipe.scale - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def pixel_intake(name: str, model: PreTrainedModel, directory: Path) -> PixelIntake:
    """Of an image model in evaluation mode.

    Raises:
        ModelError: no image processor lies beside it, it reads another size, or one image can see another.
    """
    _require_no_batch_norm(name, model)
    recipe = load_recipe(directory)
    pixels = pixel_values(_noise(MADE_UP, recipe), recipe).to(model.dtype)
    try:
        tokens = _tokens(model, pixels)
        _require_isolation(name, model, pixels)
    except (ValueError, RuntimeError, TypeError) as error:
        size = f"{recipe.frame.height} x {recipe.frame.width} pixels"
        raise ModelError(
            f"model.name {name!r}: {type(model).__name__} does not take images of {size}, "
            f"as its {RECIPE} makes them: {error}; put the image processor there that belongs to it"
        ) from error
    return PixelIntake(directory=directory, recipe=recipe, tokens=tokens)


def _noise(count: int, recipe: Recipe) -> Tensor:
    frame = recipe.frame
    draw = torch.Generator().manual_seed(SEED)
    shape = count, CHANNELS, frame.height, frame.width
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def _require_no_batch_norm(name: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(
                f"model.name {name!r}: {path!r} of {type(model).__name__} is a batch normalisation, through which "
                "records see each other; take a model with layer normalisation, such as ViT, DeiT or DINOv2"
            )


def _tokens(model: nn.Module, pixels: Tensor) -> int:
    """Rows that the busiest linear layer multiplies for one image; of a ViT, its patches and one more."""
    seen = [1]
    layers = {module: module for module in model.modules() if isinstance(module, nn.Linear)}
    image = {"pixel_values": pixels[:1]}
    hear(model, layers, image, lambda layer, given: seen.append(given.numel() // layer.in_features))
    return max(seen)


@torch.no_grad()
def _require_isolation(name: str, model: PreTrainedModel, pixels: Tensor) -> None:
    """Refuses a model whose logits for an image move with the images beside it: no clip could bound its influence."""
    expected = model(pixel_values=pixels[:1]).logits
    others = pixels.flip(-1)
    others[0] = pixels[0]
    changes = [
        float((model(pixel_values=beside).logits[:1] - expected).norm() / expected.norm().clamp(min=1e-12))
        for beside in (pixels, others)
    ]
    # a few roundings of the model's dtype, against changes of order 1 where others are seen
    bound = 0.05 if model.dtype == torch.bfloat16 else 1e-4
    if not all(change <= bound for change in changes):  # a number that is none is no proof either
        raise ModelError(
            f"model.name {name!r}: {type(model).__name__} gives an image other logits beside others (relative change "
            f"{max(changes):.2g}), so records would not stay apart; take one that looks at each image alone"
        )
