"""Image classifiers: what they are given, what is clipped of an image, and which of them are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from fedlora.config import schema
from fedlora.config.ranks import rank_of
from fedlora.data.images import decoded
from fedlora.data.records import Examples
from fedlora.data.texts import Picture
from fedlora.errors import ModelError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.opacus_engine import OpacusEngine
from fedlora.training.batches import ALONE, micro_batches
from fedlora.training.image_recipe import RECIPE, load_recipe
from fedlora.training.load import load_model
from fedlora.training.pixels import pixel_values
from fedlora.training.prefix import frozen_prefix
from fedlora.training.public import mean_inputs
from fedlora.training.tasks import evaluate, losses, record_accuracies
from tests.pictures import encoded, picture, save_model

CLASSES = ("bars", "disc", "stripes")
KINDS = ("vit", "deit")
TOKENS = {"vit": 17, "deit": 18}
"""Patches, the class token, and DeiT's token of its teacher."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return {kind: save_model(root / kind, kind) for kind in KINDS}


def loaded(place, head="trained", *, redraw=True, targets=("q_proj", "v_proj"), dtype="float64", **model):
    lora = schema.Lora(r=2, lora_alpha=2, target_modules=targets if targets == "all-linear" else list(targets),
                       init="orthonormal")  # fmt: skip
    task = schema.ImageClassification(kind="image-classification", head=head)
    adapted = load_model(schema.Model(name=str(place), dtype=dtype, **model), task, lora, CLASSES, 0)
    assert all(rank_of(lora, site) == 2 for site in adapted.sites)
    if redraw:  # zeros of B and of the head would hide a wrong gradient below them
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (*adapted.trained.values(), *(a for a, _ in adapted.live.values())):
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.3)
    return adapted


def examples_of(count, seed=0, side=16):
    draw = np.random.Generator(np.random.Philox(seed))
    return Examples(
        input_ids=draw.integers(0, 256, count * 3 * side * side).astype(np.uint8),
        offsets=np.arange(count + 1) * (3 * side * side),
        labels=draw.integers(0, 3, count),
    )


SHORTEST = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 18}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "resample": 3,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
"""As DINOv2's: the shape is kept, and the longer side cut."""
OLD_CLIP = {**SHORTEST, "image_processor_type": "CLIPImageProcessor", "size": 18, "crop_size": 16}
"""As older files have it: the number is the shorter side's, where ViT's and DeiT's is a square's."""


@pytest.mark.parametrize("kind", [*KINDS, "shortest", "old"])
@pytest.mark.parametrize("shape", [(20, 20), (17, 33), (40, 19)])
def test_a_model_is_given_what_its_own_image_processor_makes(places, tmp_path, kind, shape):
    (tmp_path / RECIPE).write_text(json.dumps(OLD_CLIP if kind == "old" else SHORTEST))
    place = places.get(kind, tmp_path)
    draw = np.random.Generator(np.random.Philox(4))
    pixels = np.tile(picture("disc", draw), (2, 2, 1))[: shape[0], : shape[1]]
    recipe = load_recipe(place)
    row = decoded(Picture(content=encoded(pixels), where="t"), recipe.frame)
    ours = pixel_values(torch.tensor(row)[None], recipe)
    processor = AutoImageProcessor.from_pretrained(place)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_head_starts_at_zero_and_an_image_counts_as_its_patches(places, kind):
    adapted = loaded(places[kind], redraw=False)
    assert sorted(name for name in adapted.trained if "lora" not in name) == [
        "classifier.bias",
        "classifier.weight",
    ]
    assert not any(tensor.any() for tensor in adapted.head().values())
    assert not loaded(places[kind], "frozen", redraw=False).head()
    assert adapted.intake.tokens == adapted.intake.most_tokens(None) == TOKENS[kind]
    examples = examples_of(9)
    groups = micro_batches(examples, np.arange(9), 4 * TOKENS[kind], adapted.intake)
    assert [len(group) for group in groups] == [4, 4, 1]
    assert [len(g) for g in micro_batches(examples, np.arange(9), ALONE, adapted.intake)] == [1] * 9
    assert adapted.intake.blank(2, 5).input_ids.shape == (2 * 3 * 16 * 16,)
    assert (
        len(loaded(places[kind], targets="all-linear").sites) == 12
    )  # four of attention and two behind it, twice


def one_by_one(adapted, place, examples, bound):
    """The definition: each image alone through plain autograd, clipped jointly, added up."""
    wanted = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in adapted.trained.items()}
    for index in range(len(examples)):
        one = examples.select(np.array([index]))
        images = torch.tensor(one.input_ids.reshape(1, 3, 16, 16))
        pixels = pixel_values(images, load_recipe(place)).to(adapted.peft_model.dtype)
        logits = adapted.peft_model(pixel_values=pixels).logits
        wide = logits if logits.dtype == torch.float64 else logits.float()
        found = torch.autograd.grad(
            cross_entropy(wide, torch.tensor(one.labels)), list(adapted.trained.values())
        )
        norm = float(torch.stack([gradient.double().square().sum() for gradient in found]).sum().sqrt())
        assert bound is None or norm > bound, "nothing would be clipped"
        for name, gradient in zip(adapted.trained, found, strict=True):
            wanted[name] += gradient.double() * (1.0 if bound is None else bound / norm)
    return wanted


@pytest.mark.parametrize("engine", [DirectEngine, OpacusEngine])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [None, 0.05])
def test_each_image_is_clipped_as_autograd_has_it_alone(places, kind, engine, bound):
    adapted, examples = loaded(places[kind]), examples_of(5)
    wanted = one_by_one(adapted, places[kind], examples, bound)
    batches = losses(adapted, examples, np.arange(5), 3 * TOKENS[kind])
    sums = engine().clipped_sum(adapted.peft_model, adapted.trained, batches, bound)
    for name, value in wanted.items():
        # Opacus adds 1e-6 to the norm that it divides by
        assert float((sums[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def test_scores_are_those_of_the_logits_and_an_image_is_scored_alone(places):
    adapted, examples = loaded(places["vit"]), examples_of(12)
    images = torch.tensor(examples.input_ids.reshape(12, 3, 16, 16))
    with torch.no_grad():
        pixels = pixel_values(images, load_recipe(places["vit"])).double()
        logits = adapted.peft_model(pixel_values=pixels).logits
    labels = torch.tensor(examples.labels)
    right = (logits.argmax(1) == labels).double()
    found = evaluate(adapted, examples)
    assert (found.metric, found.value) == ("accuracy", float(right.mean()))
    assert found.loss == pytest.approx(float(cross_entropy(logits, labels)))
    assert torch.equal(record_accuracies(adapted, examples).sort().values, right.sort().values)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-9),
        ({"dtype": "float32", "quantization": "int8"}, 1e-4),
        ({"dtype": "float32", "quantization": "nf4"}, 1e-4),
        ({"dtype": "bfloat16"}, 0.1),  # kernels round by how many images there are
    ],
)  # fmt: skip
def test_what_saves_memory_of_texts_saves_it_of_images(places, changes, tolerance):
    adapted, examples = loaded(places["vit"], **changes), examples_of(4)
    batches = losses(adapted, examples, np.arange(4))
    found = DirectEngine().clipped_sum(adapted.peft_model, adapted.trained, batches, None)
    for name, value in one_by_one(adapted, places["vit"], examples, None).items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()), name


def test_the_mean_input_is_that_of_public_images(places):
    adapted = loaded(places["vit"])
    inputs = adapted.intake.public(adapted.peft_model.base_model.model)
    assert inputs["pixel_values"].shape == (16, 3, 16, 16)
    assert inputs["pixel_values"].std() > 0.2, "an image without light and shade would show nothing"
    means = mean_inputs(adapted.peft_model, adapted.layers(), inputs)
    assert means.keys() == set(adapted.sites)
    again = loaded(places["vit"]).intake.public(adapted.peft_model.base_model.model)
    assert torch.equal(inputs["pixel_values"], again["pixel_values"])


def test_no_states_are_kept_of_images(places):
    lora = schema.Lora(
        r=2, lora_alpha=2, target_modules=["q_proj"], layers_to_transform=[1], init="orthonormal"
    )
    task = schema.ImageClassification(kind="image-classification")
    assert frozen_prefix(load_model(schema.Model(name=str(places["vit"])), task, lora, CLASSES, 0)) is None


def test_batch_normalisation_is_refused(tmp_path):
    config = LevitConfig(image_size=16, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
                         key_dim=[4, 4, 4], num_labels=3)  # fmt: skip
    LevitForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a batch normalisation, through which records see each other"):
        loaded(tmp_path)


def test_windows_folded_into_the_batch_are_refused_before_anything_is_paid(places, tmp_path):
    """Each image stays alone in Swin, so only the layers' inputs show that rows are windows."""
    config = SwinConfig(image_size=16, patch_size=2, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2],
                        num_labels=3)  # fmt: skip
    SwinForImageClassification(config).save_pretrained(tmp_path)
    shutil.copy(places["vit"] / RECIPE, tmp_path)
    with pytest.raises(
        ModelError, match=r"_proj.lora_B.default' is given \d+ rows of 3 records, as an image's windows"
    ):
        loaded(tmp_path)


def test_the_head_of_dinov2_reads_the_class_token_and_the_mean_patch(places, tmp_path):
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    Dinov2ForImageClassification(config).save_pretrained(tmp_path)
    shutil.copy(places["vit"] / RECIPE, tmp_path)
    adapted, examples = loaded(tmp_path), examples_of(4)
    assert adapted.head()["classifier.weight"].shape == (3, 64)
    found = DirectEngine().clipped_sum(
        adapted.peft_model, adapted.trained, losses(adapted, examples, np.arange(4)), 0.05
    )
    for name, value in one_by_one(adapted, tmp_path, examples, 0.05).items():
        assert float((found[name] - value).norm()) <= 1e-9 * float(value.norm()), name


def test_a_model_that_compares_images_is_refused(places, monkeypatch):
    from transformers import ViTForImageClassification

    real = ViTForImageClassification.forward

    def centred(self, pixel_values, **rest):
        return real(self, pixel_values - pixel_values.mean(dim=0) / 9, **rest)

    monkeypatch.setattr(ViTForImageClassification, "forward", centred)
    with pytest.raises(ModelError, match="gives an image other logits beside others"):
        loaded(places["vit"])


def test_logits_that_are_no_numbers_prove_nothing(places, monkeypatch):
    from transformers import ViTForImageClassification

    real = ViTForImageClassification.forward

    def spoiled(self, pixel_values, **rest):
        found = real(self, pixel_values, **rest)
        found.logits[len(pixel_values) // 3 - 1] = float("nan")  # of the first of three, and the last of one
        return found

    monkeypatch.setattr(ViTForImageClassification, "forward", spoiled)
    with pytest.raises(ModelError, match="gives an image other logits beside others"):
        loaded(places["vit"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (None, f"holds no {RECIPE}, which says how large its images are"),
        ({"size": {"height": 32, "width": 32}}, "does not take images of 32 x 32 pixels"),
        ({"size": {"shortest_edge": 16}}, "leaves images of unequal shape"),
        ({"size": {"shortest_edge": 16, "longest_edge": 20}}, "bounds both edges"),
        ({"image_mean": [0.5]}, "three channels"),
        ({"image_std": [0.5, 0.0, 0.5]}, "three channels"),
        ({"size": "large"}, "three channels"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "three channels"),
        ({"image_std": [0.5, float("inf"), 0.5]}, "three channels"),
        ({"rescale_factor": 0}, "rescale_factor 0.0"),
        ({"resample": 17}, "resample 17, no filter of Pillow's"),
        ({"crop_pct": 0.875}, "ViTImageProcessor has crop_pct, which is not done here"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order, which is not done here"),
        ({"image_processor_type": None, "feature_extractor_type": "ConvNextFeatureExtractor"}, "has a step of its own"),
    ],
)  # fmt: skip
def test_an_image_processor_that_is_not_the_models_is_refused(tmp_path, words, message):
    place = save_model(tmp_path / "model")
    path = place / RECIPE
    if words is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **words}))
    with pytest.raises(ModelError, match=message):
        loaded(place)
