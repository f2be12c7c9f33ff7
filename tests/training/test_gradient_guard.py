"""Before a client is asked, made-up tokens show that all that is trained can be; public ones, how many are clipped."""

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.training.guards import clip_note, public_clip_share, require_gradients
from fedlora.training.load import load_model
from fedlora.training.tasks import losses
from fedlora.values import Adapters, Factors

TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "roberta": ["query", "key", "value", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def loaded(path, name, targets, **lora):
    causal = name in ("llama", "gpt2")
    task = CausalLm(kind="causal-lm") if causal else Classification(kind="sequence-classification")
    classes = () if causal else ("a", "b", "c")
    rank = Lora(r=2, lora_alpha=2, target_modules=targets, **lora)
    return load_model(Model(name=str(path)), task, rank, classes, seed=1)


def start_of(model):
    """As it was loaded, with A as it is drawn and B zero."""
    sites = {
        site: Factors(a=a.detach().clone(), b=b.detach().clone(), left=left_of(model, site))
        for site, (a, b) in model.live.items()
    }
    return Adapters(basis=0, scale=model.scale, sites=sites, head=model.head())


def left_of(model, site):
    """Orthonormal columns for a core."""
    if site not in model.left:
        return None
    return torch.linalg.qr(
        torch.arange(model.left[site].numel()).sin().view(model.left[site].shape).float()
    ).Q


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("trains", ["b", "ab", "core"])
def test_every_linear_layer_of_real_architectures_passes_and_the_model_stays_as_it_was(tiny, name, trains):
    model = loaded(tiny[name], name, TARGETS[name], trains=trains)
    start = start_of(model)
    require_gradients(model, start)
    assert all(torch.equal(b, start.sites[site].b) for site, (_, b) in model.live.items())
    assert all(torch.equal(model.head()[head], value) for head, value in start.head.items())
    assert all(parameter.grad is None for parameter in model.trained.values())


class Deaf(nn.Module):
    """A layer that passes something on of which nothing can be learnt."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).detach()


def test_a_module_whose_gradient_is_cut_off_is_named(tiny):
    model = loaded(tiny["bert"], "bert", ["query", "value"])
    layer = model.layers()["bert.encoder.layer.1.attention.self.query"]
    layer.lora_B["default"] = Deaf(layer.lora_B["default"])
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.query\.lora_B' cannot be trained"):
        require_gradients(model, start_of(model))


def test_a_pretrained_weight_that_is_no_number_is_found(tiny):
    model = loaded(tiny["llama"], "llama", ["q_proj"])
    with torch.no_grad():
        model.layers()["model.layers.1.self_attn.q_proj"].get_base_layer().weight[0, 0] = torch.nan
    with pytest.raises(
        ModelError,
        match=r"layers\.0\.self_attn\.q_proj\.lora_B' and|layers\.0\.self_attn\.q_proj\.lora_B', 'model",
    ):
        require_gradients(model, start_of(model))


def records(count):
    draw = np.random.default_rng(3)
    return Examples(
        input_ids=draw.integers(5, 59, 6 * count).astype(np.int32),
        offsets=np.arange(0, 6 * count + 1, 6),
        labels=draw.integers(0, 3, count),
    )


def test_the_share_is_that_of_gradients_that_autograd_finds_too_long(tiny):
    model, public = loaded(tiny["bert"], "bert", ["query", "value"]), records(40)
    norms = []
    for one in range(32):
        (loss,) = [each() for each in losses(model, public, np.array([one]))]
        found = torch.autograd.grad(loss.sum(), list(model.trained.values()))
        norms.append(float(torch.cat([gradient.flatten() for gradient in found]).norm()))
    middle = float(np.median(norms))
    for clip in (0.5 * min(norms), middle, 2 * max(norms)):
        assert public_clip_share(model, public, clip) == pytest.approx(np.mean(np.array(norms) > clip))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.0, 0.0], "clipped none"),
        ([1.0, 1.0], "clipped all"),
        ([0.0, 1.0], None),
        ([0.5], None),
        ([], None),
    ],
)
def test_a_clip_that_never_or_always_bites_is_told(tiny_config, shares, said):
    lines = [{"round": 0, "public_clip_share": 0.25}]
    lines += [{"round": number, "public_clip_share": share} for number, share in enumerate(shares, start=1)]
    note = clip_note(lines, tiny_config().privacy)
    assert note is None if said is None else said in note
    assert clip_note(lines, "none") is None
