"""An exported adapter is the run's own model, for whoever loads it with PEFT alone."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedlora.errors import ConfigError, FedLoraError
from fedlora.export.peft_directory import load_adapter, write_adapter
from fedlora.training.load import load_model
from fedlora.values import Adapters, Factors

CLASSES = ("kitchen", "music", "weather")


def trained(config, b_std=1.0) -> tuple[object, Adapters]:
    """The run's model, moved: nothing in A, B or head is zero."""
    model = load_model(config.model, config.task, config.lora, CLASSES, config.seed)
    draw = torch.Generator().manual_seed(3)
    sites = {
        site: Factors(a=torch.randn(r_in, generator=draw), b=torch.randn(out_r, generator=draw) * b_std)
        for site, (r_in, out_r) in (
            (site, ((config.lora.r, d_in), (d_out, config.lora.r)))
            for site, (d_out, d_in) in model.shapes().items()
        )
    }
    head = {name: torch.randn(value.shape, generator=draw) for name, value in model.head().items()}
    adapters = Adapters(basis=4, scale=model.scale, sites=sites, head=head)
    model.load(adapters)
    return model, adapters


def logits(model) -> torch.Tensor:
    tokens = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


@pytest.fixture(params=["trained", "frozen"])
def run(request, tiny_config):
    config = tiny_config(task__head=request.param)
    return (config, *trained(config))


def test_peft_alone_gives_the_same_logits(run, summary, tmp_path):
    config, model, adapters = run
    path = write_adapter(tmp_path / "a", config=config, adapters=adapters, classes=CLASSES, summary=summary)
    assert not list(tmp_path.glob(".*")) and "SIMULATION" in (path / "README.md").read_text()
    told = json.loads((path / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == config.model.name and told["r"] == config.lora.r
    labels = json.loads((path / "classes.json").read_text())
    torch.manual_seed(1)  # whatever head the base starts with must not matter
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=len(labels))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, path)), logits(model.peft_model), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_what_was_trained_on_a_quantised_base_is_exported_for_the_whole_one(
    tiny_config, summary, tmp_path, quantization, merge
):
    quantised, (model, adapters) = tiny_config(model__quantization=quantization), trained(tiny_config())
    path = write_adapter(
        tmp_path / "a", config=quantised, adapters=adapters, classes=CLASSES, summary=summary, merge=merge
    )
    if merge:
        again = AutoModelForSequenceClassification.from_pretrained(path)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            quantised.model.name, num_labels=len(CLASSES)
        )
        again = PeftModel.from_pretrained(base, path)
    torch.testing.assert_close(logits(again), logits(model.peft_model), atol=1e-4, rtol=1e-4)
    assert f"in {quantization} while it was trained" in (path / "README.md").read_text()


def test_a_merged_model_needs_no_peft(run, summary, tmp_path):
    config, model, adapters = run
    wanted = logits(model.peft_model)
    path = write_adapter(
        tmp_path / "m", config=config, adapters=adapters, classes=CLASSES, summary=summary, merge=True
    )
    merged = AutoModelForSequenceClassification.from_pretrained(path)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert merged.config.id2label == dict(enumerate(CLASSES))
    assert AutoTokenizer.from_pretrained(path)("rain and wind")["input_ids"]


def test_an_exported_adapter_is_read_back(run, summary, tmp_path):
    config, model, adapters = run
    path = write_adapter(tmp_path / "a", config=config, adapters=adapters, classes=CLASSES, summary=summary)
    other = load_model(config.model, config.task, config.lora, CLASSES, config.seed + 1)
    load_adapter(path, other, CLASSES)
    torch.testing.assert_close(logits(other.peft_model), logits(model.peft_model), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused_with_the_mend(tiny_config, summary, tmp_path):
    config = tiny_config()
    model, adapters = trained(config)
    path = write_adapter(tmp_path / "a", config=config, adapters=adapters, classes=CLASSES, summary=summary)
    with pytest.raises(ConfigError, match="left alone"):
        write_adapter(path, config=config, adapters=adapters, classes=CLASSES, summary=summary)
    with pytest.raises(ConfigError, match="neither a run nor a PEFT adapter"):
        load_adapter(tmp_path, model, CLASSES)
    with pytest.raises(ConfigError, match="use the same labels"):
        load_adapter(path, model, CLASSES[::-1])
    wider = tiny_config(lora__r=4, lora__lora_alpha=4)
    with pytest.raises(ConfigError, match="other shapes"):
        load_adapter(path, load_model(wider.model, wider.task, wider.lora, CLASSES, 1), CLASSES)
    state = load_file(path / "adapter_model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.0" not in k}, path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="lacks"):
        load_adapter(path, model, CLASSES)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"init_lora_weights": "pissa"}, "began as 'pissa', which changes the base model; save it with"),
        ({"init_lora_weights": "olora"}, "began as 'olora', which changes the base model; save it with"),
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_not_put_beside_this_base(
    tiny_config, summary, tmp_path, words, told
):
    """Its B A beside the checkpoint's own weights is not the model that was trained."""
    config = tiny_config()
    model, adapters = trained(config)
    path = write_adapter(tmp_path / "a", config=config, adapters=adapters, classes=CLASSES, summary=summary)
    written = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**written, **words}))
    with pytest.raises(ConfigError, match=told) as caught:
        load_adapter(path, model, CLASSES)
    assert str(caught.value).startswith(f"{path} ")


def flaw_in_the_file(monkeypatch, change):
    """What PEFT saves from here on is what `change` makes of its tensors."""
    save = PeftModel.save_pretrained

    def flawed(self, directory, **options):
        save(self, directory, **options)
        path = f"{directory}/adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    monkeypatch.setattr(PeftModel, "save_pretrained", flawed)


def test_a_file_that_gives_other_logits_never_counts_as_written(tiny_config, summary, tmp_path, monkeypatch):
    config = tiny_config()
    _, adapters = trained(config)

    def scaled(state):
        name = next(name for name in state if "lora_B" in name)
        return {**state, name: state[name] * 1.01}

    flaw_in_the_file(monkeypatch, scaled)
    with pytest.raises(FedLoraError, match="logits that differ"):
        write_adapter(tmp_path / "a", config=config, adapters=adapters, classes=CLASSES, summary=summary)
    assert [p for p in tmp_path.iterdir() if p.name.lstrip(".").startswith("a")] == []


def zeroed(state, part):
    return {name: value * (part not in name) for name, value in state.items()}


def one_entry_moved(state, part):
    """By a hundredth of itself, which no rounding to bfloat16 takes back."""
    name = next(name for name in state if part in name)
    value = state[name].clone()
    value.view(-1)[0] *= 1.01
    return {**state, name: value}


@pytest.mark.parametrize(
    ("change", "part"),
    [(zeroed, "lora_B"), *((one_entry_moved, part) for part in ("lora_A", "lora_B", "classifier.weight"))],
)
def test_in_bfloat16_what_logits_do_not_show_is_refused_all_the_same(
    tiny_config, summary, tmp_path, monkeypatch, change, part
):
    config = tiny_config(model__dtype="bfloat16")
    _, adapters = trained(config, b_std=0.001)
    whole = {"config": config, "adapters": adapters, "classes": CLASSES, "summary": summary}
    assert write_adapter(tmp_path / "whole", **whole).is_dir()
    flaw_in_the_file(monkeypatch, lambda state: change(state, part))
    with pytest.raises(FedLoraError, match=rf"holds other values in \d+ of its tensors, such as '.*{part}"):
        write_adapter(tmp_path / "a", **whole)
    assert [path.name for path in tmp_path.iterdir() if path.name.lstrip(".").startswith("a")] == []
