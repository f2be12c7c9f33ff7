"""A run that begins from somebody's LoRA begins from exactly that model, and says so."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fedlora.algebra.factors import change, whole
from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.config.method import FedSb
from fedlora.errors import ConfigError
from fedlora.export.card import model_card
from fedlora.export.deliver import delivering
from fedlora.export.peft_directory import write_adapter
from fedlora.federation.store import Store
from fedlora.methods import build
from fedlora.runs.beginning import first_state
from fedlora.runs.summary import summary_so_far
from fedlora.runs.trained import trained_adapters
from fedlora.runtime.simulate import resume, simulate
from fedlora.training.checkpoints import base_digest
from fedlora.training.load import load_model
from fedlora.values import Delta

CLASSES = ("kitchen", "music", "weather")
TOKENS = torch.arange(5, 25).reshape(2, 10)
HARDER = {
    "rank_pattern": {"layer.1.attention.self.query": 3},
    "alpha_pattern": {"value": 5},
    "use_rslora": True,
}


def quiet(_: object) -> None:
    pass


def by_peft(model_dir: Path, directory: Path, **changes: object) -> Path:
    """A LoRA of PEFT's own, every number of it drawn, with its classifier."""
    torch.manual_seed(4)
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=3)
    config = LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["query", "value"],
            "task_type": TaskType.SEQ_CLS,
            **changes,
        }
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


def of_peft(model_dir: Path, directory: Path) -> torch.Tensor:
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=3)
    return logits(PeftModel.from_pretrained(base, directory))


def begun(config):
    model = load_model(config.model, config.task, config.lora, CLASSES, config.seed)
    state = first_state(config, model, build(config.method, config.lora, config.seed))
    model.load(state.adapters)
    return model, state


@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize("harder", [{}, HARDER], ids=["plain", "patterns and rslora"])
def test_the_first_model_is_the_adapters_own(tiny_config, tiny_encoder, tmp_path, head, harder):
    given = by_peft(tiny_encoder, tmp_path / "lora", **harder)
    config = tiny_config(
        lora__from_adapter=str(given), lora__r=4, lora__lora_alpha=9, task__head=head, lora__init="centred"
    )
    model, state = begun(config)
    assert_close(logits(model.peft_model), of_peft(tiny_encoder, given), rtol=1e-5, atol=1e-5)
    for factors in state.adapters.sites.values():
        assert_close(factors.a @ factors.a.T, torch.eye(4), rtol=0, atol=1e-5)


def test_layers_whose_weights_lie_transposed_begin_with_the_adapters_own_product(tiny_config, tmp_path):
    """GPT-2 keeps (in, out), which PEFT notes as fan_in_fan_out."""
    torch.manual_seed(5)
    shape = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    words = LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True)
    theirs = get_peft_model(base, words)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "lora")
    config = tiny_config(
        model__name=str(tmp_path / "gpt2"), task={"kind": "causal-lm"}, data__label=None,
        data__partition={"kind": "iid", "clients": 3}, lora__from_adapter=str(tmp_path / "lora"), lora__r=4,
        lora__lora_alpha=9, lora__target_modules=["c_attn", "c_fc"],
    )  # fmt: skip
    model = load_model(config.model, config.task, config.lora, (), config.seed)
    model.load(first_state(config, model, build(config.method, config.lora, config.seed)).adapters)
    assert_close(logits(model.peft_model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_core_holds_the_product_between_frames_of_its_own(tiny_config, tiny_encoder, tmp_path):
    given = by_peft(tiny_encoder, tmp_path / "lora")
    config = tiny_config(
        lora__from_adapter=str(given),
        lora__r=4,
        lora__lora_alpha=4,
        lora__trains="core",
        method={"name": "fedsb"},
    )
    model, state = begun(config)
    assert isinstance(config.method, FedSb) and all(
        f.b.shape == (4, 4) for f in state.adapters.sites.values()
    )
    assert_close(logits(model.peft_model), of_peft(tiny_encoder, given), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="directions are the weight's own"):
        tiny_config(
            lora__from_adapter=str(given), lora__trains="singular-values", lora__init="principal",
            method={"name": "svfit"},
        )  # fmt: skip


def test_what_one_run_leaves_another_begins_with_and_both_say_so(tiny_config, tmp_path):
    first = simulate(tiny_config(), tmp_path / "first", quiet)
    before, (trained, classes) = summary_so_far(first), trained_adapters(first)
    write_adapter(first / "adapter", config=tiny_config(), adapters=trained, classes=classes, summary=before)
    config = tiny_config(federation__rounds=1, lora__from_adapter=str(first / "adapter"))
    second = simulate(config, tmp_path / "second", quiet)
    theirs, ours = trained, begun(config)[1].adapters
    for site, factors in theirs.sites.items():
        assert_close(ours.sites[site].a, factors.a, rtol=0, atol=1e-6)
        assert_close(ours.sites[site].b, factors.b, rtol=0, atol=1e-6)
    assert all(torch.equal(ours.head[name], theirs.head[name]) for name in theirs.head)
    told = summary_so_far(second)
    assert told["score_before"] == before["score"] and before["began_from"] is None
    weights = (first / "adapter" / "adapter_model.safetensors").read_bytes()
    assert told["began_from"]["name"] == "adapter"
    assert told["began_from"]["sha256"] == hashlib.sha256(weights).hexdigest()
    card = model_card(config, told)
    assert told["began_from"]["sha256"] in card and "treated as public" in card and str(tmp_path) not in card


def test_other_bytes_are_another_beginning(tiny_config, tiny_encoder, tmp_path):
    given = by_peft(tiny_encoder, tmp_path / "lora")
    config = tiny_config(lora__from_adapter=str(given), federation__rounds=2)

    def stop(event: object) -> None:
        if type(event).__name__ == "RoundDone":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", stop)
    before = base_digest(config.model, config.lora)
    assert before != base_digest(config.model)
    state = load_file(given / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, given / "adapter_model.safetensors")
    assert base_digest(config.model, config.lora) != before
    with pytest.raises(ConfigError, match="holds other files now than when"):
        resume(tmp_path / "run", quiet)


def test_a_finished_runs_model_is_not_made_of_other_bytes_than_it_began_from(
    tiny_config, tiny_encoder, tmp_path, capsys
):
    """The head that PEFT's classifier carries is read again by whoever loads the run's model."""
    given, run_dir = by_peft(tiny_encoder, tmp_path / "lora"), tmp_path / "run"
    config = tiny_config(lora__from_adapter=str(given), federation__rounds=1, export_every=1)
    simulate(config, run_dir, quiet)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    state, _ = Store(run_dir).load()
    weights = given / "adapter_model.safetensors"
    before = weights.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    to = str(tmp_path / "out")
    for words in (["export", "--to", to], ["evaluate", str(tmp_path / "again.yaml")], ["resume"]):
        assert main([words[0], str(run_dir), *words[1:]]) == 2
        assert "holds other files now than when" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds other files now than when"):
        delivering(run_dir, config, quiet)(state)
    assert not any((run_dir / name).exists() for name in ("adapter", "adapters")) and not Path(to).exists()
    weights.write_bytes(before)
    assert main(["export", str(run_dir), "--to", to]) == 0


def rewritten(given: Path, **words: object) -> None:
    told = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps({**told, **words}))


REFUSED = [
    ({"use_dora": True}, "is a DoRA"),
    ({"bias": "all"}, "bias: all"),
    ({"init_lora_weights": "pissa"}, "changes the base model"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"target_parameters": ["experts.w"]}, "says target_parameters"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_is_more_than_a_product_is_refused(tiny_config, tiny_encoder, tmp_path, words, told):
    given = by_peft(tiny_encoder, tmp_path / "lora")
    rewritten(given, **words)
    with pytest.raises(ConfigError, match=f"lora.from_adapter: .*{told}"):
        begun(tiny_config(lora__from_adapter=str(given)))


def test_what_the_config_has_no_room_for_is_refused_with_the_mend(tiny_config, tiny_encoder, tmp_path):
    given = by_peft(tiny_encoder, tmp_path / "lora", r=3)
    with pytest.raises(ConfigError, match=r"rank 3 at .*raise lora.r, .* to 3"):
        begun(tiny_config(lora__from_adapter=str(given)))
    with pytest.raises(ConfigError, match=r"adapts .*value' and 1 more, which the config does not"):
        begun(tiny_config(lora__from_adapter=str(given), lora__r=3, lora__target_modules=["query"]))
    (given / "classes.json").write_text(json.dumps(CLASSES[::-1]))
    with pytest.raises(ConfigError, match="use the same labels"):
        begun(tiny_config(lora__from_adapter=str(given), lora__r=3))
    (given / "classes.json").unlink()
    state = load_file(given / "adapter_model.safetensors")
    more = {"base_model.model.bert.embeddings.LayerNorm.weight": torch.ones(32)}
    save_file({**state, **more}, given / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"carries 'bert.embeddings.LayerNorm.weight' whole"):
        begun(tiny_config(lora__from_adapter=str(given), lora__r=3))
    lacking = {name: tensor for name, tensor in state.items() if "0.attention.self.query.lora_B" not in name}
    save_file(lacking, given / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="no A and B of one rank"):
        begun(tiny_config(lora__from_adapter=str(given), lora__r=3))


def test_a_pickle_is_never_read(tiny_config, tiny_encoder, tmp_path):
    given = by_peft(tiny_encoder, tmp_path / "lora")
    (given / "adapter_model.safetensors").unlink()
    torch.save({}, given / "adapter_model.bin")
    with pytest.raises(ConfigError, match="a pickle, which is never read"):
        begun(tiny_config(lora__from_adapter=str(given)))


def test_products_of_ranks_by_layer_are_kept(tiny_config, tiny_encoder, tmp_path):
    given = by_peft(tiny_encoder, tmp_path / "lora", **HARDER)
    config = tiny_config(
        lora__from_adapter=str(given), lora__rank_pattern={"layer.1.attention.self.query": 5}
    )
    model, state = begun(config)
    assert sorted({len(f.a) for f in state.adapters.sites.values()}) == [2, 5]
    assert whole(state.adapters.sites["bert.encoder.layer.1.attention.self.query"]).b[:, 3:].abs().max() == 0
    assert_close(logits(model.peft_model), of_peft(tiny_encoder, given), rtol=1e-5, atol=1e-5)


METHODS = [
    ("fedsvd", "b", {"route": "dense"}), ("fedask", "b", {}), ("ffa", "b", {}), ("fedit", "ab", {}),
    ("fedex", "ab", {}), ("flora", "ab", {}), ("flexlora", "ab", {}), ("lora-fair", "ab", {}),
    ("rolora", "ab", {"refactor": True}), ("periodic", "b", {"restart_every": 1}),
    ("switch", "b", {"restart_every": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "trains", "more"), METHODS, ids=[name for name, *_ in METHODS])
def test_a_round_in_which_nothing_is_learnt_keeps_what_was_begun_with(
    tiny_config, tiny_encoder, tmp_path, name, trains, more
):
    given = by_peft(tiny_encoder, tmp_path / "lora")
    config = tiny_config(
        lora__from_adapter=str(given), lora__r=3, lora__lora_alpha=3, lora__trains=trains,
        method={"name": name, **more},
    )  # fmt: skip
    adapters = begun(config)[1].adapters
    method = build(config.method, config.lora, config.seed)
    nothing = {site: torch.zeros_like(factors.b) for site, factors in adapters.sites.items()}
    of_a = {site: torch.zeros_like(factors.a) for site, factors in adapters.sites.items()}
    head = {key: torch.zeros_like(value) for key, value in adapters.head.items()}
    step = Delta(basis=0, sites=nothing, head=head, a=of_a if trains == "ab" else {})
    after = method.subspace.move(method.mean.moved(adapters, step, {}, 1), 1, next_side=method.side(2))
    for site, factors in adapters.sites.items():
        assert change(factors, adapters.scale).norm() > 0.1
        assert_close(
            change(after.sites[site], after.scale), change(factors, adapters.scale), rtol=0, atol=1e-5
        )
