"""Images of the tests' own, and image classifiers small enough to read them."""

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

SHAPES = ("bars", "disc", "stripes")
SIDE = 20
"""Pixels of a file; the models below read 16."""
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16,
    "patch_size": 4, "num_labels": 5, "initializer_range": 0.2,
}  # fmt: skip
RECIPES = {
    "vit": {"type": "ViT", "size": {"height": 16, "width": 16}, "resample": 2, "mean": 0.5, "std": 0.5},
    "deit": {
        "type": "DeiT",
        "size": 18,
        "do_center_crop": True,
        "crop_size": 16,
        "resample": 3,
        "mean": 0.4,
        "std": 0.3,
    },
}
"""As in preprocessor_config.json; the second also loses its rim, in the words of older files."""


def save_model(path: Path, kind: str = "vit", **changes: object) -> Path:
    """A random image classifier with its image processor, saved as any local model is."""
    made = {"vit": (ViTConfig, ViTForImageClassification), "deit": (DeiTConfig, DeiTForImageClassification)}
    config, model = made[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model(config(**{**SIZES, **changes})).save_pretrained(path)
    words = dict(RECIPES[kind])
    mean, std = ([words.pop(name)] * 3 for name in ("mean", "std"))
    words |= {
        "image_processor_type": f"{words.pop('type')}ImageProcessor",
        "image_mean": mean,
        "image_std": std,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(words))
    return path


def picture(shape: str, draw: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: a shape in a colour of its class, at a random place, under some noise."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    first, second = draw.integers(0, SIDE, 2)
    inside = {
        "bars": (columns + first) % 8 < 4,
        "stripes": (rows + first) % 8 < 4,
        "disc": (rows - first) ** 2 + (columns - second) ** 2 < 49,
    }[shape]
    colour = {"bars": (220, 60, 40), "disc": (40, 200, 80), "stripes": (50, 70, 230)}[shape]
    clean = np.where(inside[..., None], colour, 110)
    return np.clip(clean + draw.normal(0, 25, clean.shape), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """The bytes of an image file."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def save_pictures(path: Path, counts: dict[str, int]) -> None:
    """A table NAME.csv of `picture` and `shape` for each name and count, and the files beside it."""
    draw = np.random.Generator(np.random.Philox(2))
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        rows = [("picture", "shape")]
        for number in range(count):
            shape = SHAPES[number % 3]
            (path / name / f"{number}.png").write_bytes(encoded(picture(shape, draw)))
            rows.append((f"{name}/{number}.png", shape))
        with (path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
