import dataclasses
import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)  # fmt: skip

from fedlora.algebra.digest import digest
from fedlora.config.schema import CausalLm, Classification, Lora, Model, Sgd
from fedlora.data.records import Examples, States, concatenate
from fedlora.data.tokenise import fingerprint
from fedlora.errors import ConfigError, ShapeError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.privacy.noise import SeededNoise
from fedlora.privacy.sampling import poisson
from fedlora.training.client import Node, train
from fedlora.training.load import load_model
from fedlora.training.prefix import frozen_prefix, lowest_adapted
from fedlora.training.states import cached_bytes, with_states
from fedlora.training.tasks import ALONE, evaluate, losses, micro_batches, record_accuracies
from fedlora.values import Adapters, Factors, LocalWork, TrainRequest
from tests.damage import flipped

LAYERS = 4
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
SITES = {
    "bert": ["query", "value"],
    "roberta": ["query"],
    "distilbert": ["q_lin"],
    "modernbert": ["Wqkv"],
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "down_proj"],
    "gpt2": ["attn.c_attn"],
}
CAUSAL = ("llama", "qwen2", "gpt2")
LENGTHS = [3, 9, 4, 12, 1, 7, 5]


def _models():
    yield "bert", BertModel(BertConfig(vocab_size=60, **SIZES))
    roberta = RobertaConfig(vocab_size=60, max_position_embeddings=40, **SIZES)
    yield "roberta", RobertaModel(roberta, add_pooling_layer=False)
    distilbert = DistilBertConfig(vocab_size=60, dim=16, n_layers=LAYERS, n_heads=2, hidden_dim=32)
    yield "distilbert", DistilBertModel(distilbert)
    # every second layer sees 4 tokens to each side only
    modernbert = ModernBertConfig(
        vocab_size=60, global_attn_every_n_layers=2, local_attention=8, **SIZES, **MARKS
    )
    yield "modernbert", ModernBertForMaskedLM(modernbert)
    yield "llama", LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES))
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(vocab_size=60, **SIZES, num_key_value_heads=1))
    gpt2 = GPT2Config(vocab_size=60, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=40, eos_token_id=2)
    yield "gpt2", GPT2LMHeadModel(gpt2)
    yield "albert", AlbertModel(AlbertConfig(vocab_size=60, embedding_size=16, **SIZES))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Directory of each model of four layers, by architecture."""
    root = tmp_path_factory.mktemp("deep")
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, model in _models():
            model.save_pretrained(root / name)
    return root


def model_of(place, layers=(2, 3), dtype="float64", targets=None):
    name = Path(place).name
    causal = name in CAUSAL
    task = CausalLm(kind="causal-lm") if causal else Classification(kind="sequence-classification")
    layers = None if layers is None else list(layers)
    lora = Lora(r=2, lora_alpha=2.0, target_modules=targets or SITES[name], layers_to_transform=layers)
    adapted = load_model(
        Model(name=str(place), dtype=dtype), task, lora, () if causal else ("a", "b", "c"), 0
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zero, where every loss and most gradients would be equal
        for parameter in adapted.trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return adapted


def examples_of(lengths, seed=0, types=False):
    draw = np.random.Generator(np.random.Philox(seed))
    tokens = sum(lengths)
    return Examples(
        input_ids=draw.integers(5, 60, size=tokens).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=draw.integers(0, 3, size=len(lengths)),
        token_type_ids=draw.integers(0, 2, size=tokens).astype(np.int8) if types else None,
    )


def cached(path, adapted, examples, base_model="w", alone=False):
    prefix = frozen_prefix(adapted)
    assert prefix is not None
    return with_states(path, adapted, prefix, examples, base_model=base_model, alone=alone)


def rows_of(examples):
    return np.array(examples.states.of(examples.offsets))


def by_record(adapted, examples, budget):
    """Loss and gradients of every record, by its index, out of micro-batches of the given size."""
    indices = np.arange(len(examples))
    found = {}
    groups = micro_batches(examples, indices, budget)
    for group, run in zip(groups, losses(adapted, examples, indices, budget), strict=True):
        for index, loss in zip(group.tolist(), run(), strict=True):
            gradients = torch.autograd.grad(loss, list(adapted.trained.values()), retain_graph=True)
            found[index] = torch.cat([loss.detach()[None], *(g.flatten() for g in gradients)])
    return torch.stack([found[index] for index in indices])


@pytest.mark.parametrize("name", SITES)
def test_from_its_states_a_record_has_the_loss_and_the_gradient_of_a_whole_pass(deep, tmp_path, name):
    adapted = model_of(deep / name)
    plain = examples_of(LENGTHS, types=name == "bert")
    kept = cached(tmp_path / "c", adapted, plain)
    for budget in (ALONE, 30, 10_000):
        whole, short = (by_record(adapted, examples, budget) for examples in (plain, kept))
        assert whole[1:].abs().max() > 1e-3
        # float64: some hundred products of order 1, rounded by 1e-16 each
        assert_close(short, whole, rtol=1e-12, atol=1e-12)
    assert evaluate(adapted, kept).loss == pytest.approx(evaluate(adapted, plain).loss, rel=1e-12)
    assert torch.equal(record_accuracies(adapted, kept), record_accuracies(adapted, plain))


@pytest.mark.parametrize("name", SITES)
def test_with_states_no_layer_below_is_touched_and_every_layer_above_is(deep, tmp_path, name):
    adapted = model_of(deep / name)
    prefix = lowest_adapted(adapted)
    stack = adapted.peft_model.base_model.get_submodule("model").get_submodule(prefix.stack)
    calls = [0] * LAYERS

    def count(layer):
        def hook(*_):
            calls[layer] += 1

        return hook

    for layer, module in enumerate(stack):
        for part in module.modules():
            if not list(part.children()):
                part.register_forward_hook(count(layer))
    plain = examples_of(LENGTHS)
    kept = cached(tmp_path / "c", adapted, plain)
    counted = []
    for examples in (plain, kept, plain):
        calls[:] = [0] * LAYERS
        by_record(adapted, examples, 10_000)
        counted.append([bool(number) for number in calls])
    assert counted == [[True] * 4, [False, False, True, True], [True] * 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_records_that_run_alone_give_the_same_bits_with_states_and_without(deep, tmp_path, dtype):
    adapted = model_of(deep / "llama", dtype=dtype)
    plain = examples_of(LENGTHS)
    kept = cached(tmp_path / "c", adapted, plain, alone=True)
    assert kept.states.rows.dtype == {"float32": np.float32, "bfloat16": np.uint16}[dtype]
    assert torch.equal(by_record(adapted, kept, ALONE), by_record(adapted, plain, ALONE))


def test_a_record_s_states_alone_do_not_know_its_neighbours(deep, tmp_path):
    adapted = model_of(deep / "bert", dtype="float32")
    both, other = examples_of(LENGTHS), examples_of([30, 9, 2], seed=5)
    shared = Examples(  # the second record of both, between others
        input_ids=np.concatenate([other.input_ids[:30], both.select(np.array([1])).input_ids]),
        offsets=np.array([0, 30, 39]),
        labels=np.array([0, both.labels[1]]),
    )
    here, there = (
        cached(tmp_path / name, adapted, examples, alone=True).select(np.array([1]))
        for name, examples in (("here", both), ("there", shared))
    )
    assert np.array_equal(rows_of(here), rows_of(there))


def update(place, path, examples):
    """Digest of a client's update after three private-sized steps in float32, by way of the states at `path`."""
    torch.set_num_threads(1)
    adapted = model_of(place, dtype="float32")
    node = Node(
        client="c", model=adapted, examples=cached(path, adapted, examples), declared_records=len(examples),
        sampling=poisson(4, len(examples)), optimizer=Sgd(name="sgd", lr=0.5), mechanism=None, alone=False,
        evaluation_noise=None, budget=None, engine=DirectEngine(), noise=SeededNoise(1),
    )  # fmt: skip
    sites = {
        site: Factors(a=a.detach().clone(), b=b.detach().clone()) for site, (a, b) in adapted.live.items()
    }
    start = Adapters(basis=0, scale=adapted.scale, sites=sites, head=adapted.head())
    request = TrainRequest(
        run="r", base_model="w", code="k", round=1, adapters=start,
        work=LocalWork(steps=3, learning_rate=0.5),
    )  # fmt: skip
    delta = train(node, request, None).delta
    return digest({**{f"b {site}": b for site, b in delta.sites.items()}, **delta.head})


def test_an_update_has_the_same_bits_whoever_wrote_the_states(deep, tmp_path):
    examples = examples_of(LENGTHS * 3)
    here = update(deep / "bert", tmp_path / "here", examples)
    assert here != update(deep / "bert", tmp_path / "other", examples_of(LENGTHS * 3, seed=1))
    with multiprocessing.get_context("spawn").Pool(1) as other:
        arguments = [(deep / "bert", tmp_path / name, examples) for name in ("here", "there")]
        assert other.starmap(update, arguments) == [here, here]
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()
    assert update(deep / "bert", tmp_path / "there", examples) == here


def damaged(content):
    yield content[:-1]
    yield content + b"\0"
    yield b""
    yield flipped(content)
    yield b"<f4" + content[3:]


def test_a_damaged_file_is_written_anew(deep, tmp_path):
    adapted, examples = model_of(deep / "bert"), examples_of(LENGTHS)
    expected = rows_of(cached(tmp_path / "c", adapted, examples))
    content = (tmp_path / "c").read_bytes()
    for damage in damaged(content):
        (tmp_path / "c").write_bytes(damage)
        assert np.array_equal(rows_of(cached(tmp_path / "c", adapted, examples)), expected)
        assert (tmp_path / "c").read_bytes() == content


def test_a_file_of_anything_else_is_never_used(deep, tmp_path):
    adapted, examples = model_of(deep / "bert"), examples_of(LENGTHS)
    others = [
        lambda: cached(tmp_path / "c", adapted, examples_of(LENGTHS, seed=1)),
        lambda: cached(tmp_path / "c", adapted, examples, base_model="v"),
        lambda: cached(tmp_path / "c", adapted, examples, alone=True),
        lambda: cached(tmp_path / "c", model_of(deep / "bert", layers=(3,)), examples),
        lambda: cached(tmp_path / "c", model_of(deep / "bert", dtype="float32"), examples),
    ]
    cached(tmp_path / "c", adapted, examples)
    mine = (tmp_path / "c").read_bytes()
    for other in others:
        other()
        assert (tmp_path / "c").read_bytes() != mine
        cached(tmp_path / "c", adapted, examples)
        assert (tmp_path / "c").read_bytes() == mine


def test_a_whole_file_is_read_and_not_written_again(deep, tmp_path):
    adapted, examples = model_of(deep / "bert"), examples_of(LENGTHS)
    cached(tmp_path / "c", adapted, examples)
    before = (tmp_path / "c").stat()
    with torch.no_grad():  # a later round
        for parameter in adapted.trained.values():
            parameter.add_(1)
    cached(tmp_path / "c", adapted, examples)
    assert (tmp_path / "c").stat() == before


def test_only_the_owner_reads_the_states_and_their_size_is_foretold(deep, tmp_path):
    adapted, examples = model_of(deep / "bert", dtype="bfloat16"), examples_of(LENGTHS)
    cached(tmp_path / "below" / "c", adapted, examples)
    found = (tmp_path / "below" / "c").stat()
    assert found.st_mode & 0o777 == 0o600
    assert cached_bytes(adapted, examples) == sum(LENGTHS) * 16 * 2
    assert 0 < found.st_size - cached_bytes(adapted, examples) < 200
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["c"]


def test_a_disk_without_room_is_an_error_that_names_the_key_and_leaves_nothing(deep, tmp_path):
    adapted, examples = model_of(deep / "bert"), examples_of(LENGTHS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"5,248 bytes.*runtime\.cache_prefix: false"):
            cached(tmp_path / "c", adapted, examples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_selection_copies_no_rows_until_they_are_asked_for(deep, tmp_path):
    examples = cached(tmp_path / "c", model_of(deep / "bert"), examples_of(LENGTHS))
    assert isinstance(examples.states.rows, np.memmap)
    chosen = examples.select(np.array([3, 0]))
    assert chosen.states.rows is examples.states.rows
    rows = [examples.states.rows[examples.offsets[i] : examples.offsets[i + 1]] for i in (3, 0)]
    assert np.array_equal(rows_of(chosen), np.concatenate(rows))
    assert not np.shares_memory(rows_of(chosen), examples.states.rows)
    assert np.array_equal(rows_of(examples.between(2, 5)), rows_of(examples.select(np.arange(2, 5))))


def test_joined_records_have_the_states_of_each_wherever_they_lie(deep, tmp_path):
    adapted = model_of(deep / "bert")
    one, other = (
        cached(tmp_path / name, adapted, examples_of(LENGTHS, seed=seed))
        for name, seed in (("a", 0), ("b", 1))
    )
    parts = [one.select(np.array([4, 1])), one.select(np.array([0]))]
    beside = concatenate(parts)
    assert beside.states.rows is one.states.rows
    parts.append(other.select(np.array([2, 6])))
    for joined, whole in ((beside, parts[:2]), (concatenate(parts), parts)):
        assert np.array_equal(rows_of(joined), np.concatenate([rows_of(part) for part in whole]))
    with pytest.raises(ShapeError, match="1 of 2 parts have states"):
        concatenate([one, examples_of(LENGTHS)])


def test_states_are_no_part_of_the_data_s_fingerprint(deep, tmp_path):
    plain = examples_of(LENGTHS)
    assert fingerprint(cached(tmp_path / "c", model_of(deep / "bert"), plain)) == fingerprint(plain)


def test_a_client_without_records_has_no_states(deep, tmp_path):
    assert cached(tmp_path / "c", model_of(deep / "bert"), examples_of([])).states is None
    assert list(tmp_path.iterdir()) == []


def test_the_probe_leaves_the_model_as_it_was(deep):
    adapted = model_of(deep / "bert")
    before = {name: parameter.detach().clone() for name, parameter in adapted.trained.items()}
    rows = by_record(adapted, examples_of(LENGTHS), 10_000)
    assert frozen_prefix(adapted).layer == 2
    assert all(torch.equal(before[name], parameter) for name, parameter in adapted.trained.items())
    assert torch.equal(by_record(adapted, examples_of(LENGTHS), 10_000), rows)


def test_where_nothing_lies_below_there_is_no_prefix_and_no_warning(deep, caplog):
    assert frozen_prefix(model_of(deep / "bert", layers=None)) is None
    assert frozen_prefix(model_of(deep / "bert", layers=(0, 3))) is None
    assert frozen_prefix(model_of(deep / "bert", layers=None, targets=["pooler.dense"])) is None
    # one layer, applied four times
    assert frozen_prefix(model_of(deep / "albert", layers=None, targets=["query"])) is None
    assert caplog.text == ""


def bert_with(deep):
    adapted = model_of(deep / "bert")
    return adapted, adapted.peft_model.base_model.get_submodule("model")


def test_a_head_that_reads_a_lower_layer_runs_whole_even_while_it_is_zero(deep, caplog):
    adapted, base = bert_with(deep)
    seen = []
    base.bert.encoder.layer[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    base.classifier.register_forward_pre_hook(lambda _m, inputs: (inputs[0] + 0.01 * seen[-1][:, 0],))
    with torch.no_grad():
        for parameter in adapted.trained.values():
            parameter.zero_()
    assert frozen_prefix(adapted) is None
    assert "the logits change by" in caplog.text


def test_a_layer_applied_twice_below_runs_whole(deep, caplog):
    adapted, base = bert_with(deep)
    base.bert.encoder.layer[1] = base.bert.encoder.layer[0]
    assert frozen_prefix(adapted) is None
    assert "each once" in caplog.text


def test_something_between_the_layers_runs_whole(deep, caplog):
    adapted, base = bert_with(deep)
    base.bert.encoder.layer[2].register_forward_pre_hook(lambda _m, inputs: (inputs[0] + 1, *inputs[1:]))
    assert frozen_prefix(adapted) is None
    assert "each once" in caplog.text


def test_states_that_move_with_what_is_trained_are_not_kept(deep, caplog):
    adapted, base = bert_with(deep)
    live = next(iter(adapted.trained.values()))
    base.bert.embeddings.register_forward_hook(lambda _m, _i, output: output + live.sum())
    assert frozen_prefix(adapted) is None
    assert "what is trained moves the states" in caplog.text


def test_states_of_another_number_of_records_are_refused():
    plain = examples_of([2, 3])
    with pytest.raises(ShapeError, match="2 records but states of 1"):
        dataclasses.replace(
            plain, states=States(rows=np.zeros((5, 16), dtype=np.float32), starts=np.array([0]))
        )
