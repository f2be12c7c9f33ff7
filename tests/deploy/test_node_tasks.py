"""A data owner's node trains on completions and on pairs as it does on labels: own records, own ledger, own noise."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.config.load import load_node
from fedlora.deploy.node import DeployedNode
from fedlora.transport.wire import decode_reply, encode_request
from fedlora.values import ClientUpdate
from tests.deploy.nodes import debits, first_request

NODE = """
client: site-0
data: {{source: files, train: {train}, {columns}, max_length: 12}}
declared_records: 40
model: {{name: {model}}}
task: {task}
lora: {{r: 2, lora_alpha: 2, target_modules: [q_proj, v_proj]}}
work: {{batch_size: 8, local_steps: 2, optimizer: {{name: sgd, lr: 1.0}}}}
ledger: {folder}/state/ledger.jsonl
budget: {{target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: 2}}
max_grad_norm: 1.0
min_noise_multiplier: 0.3
reply_quantum_s: 0
"""
WORDS = ["red", "blue", "one", "two", "yes", "no"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("causal")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def node(folder, model, task, rows, columns):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = NODE.format(train=folder / "train.jsonl", columns=columns, model=model, task=task, folder=folder)
    (folder / "node.yaml").write_text(text)
    return load_node(folder / "node.yaml")


ASKED = [{"q": WORDS[i % 4], "a": WORDS[4 + i % 2], "b": WORDS[5 - i % 2]} for i in range(40)]
TALKS = [
    {"m": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}
    for row in ASKED
]


@pytest.mark.parametrize(
    ("task", "columns", "rows"),
    [
        ("{kind: causal-lm}", "prompt: q, completion: a", ASKED),
        ("{kind: dpo, beta: 0.5}", "prompt: q, chosen: a, rejected: b", ASKED),
    ],
    ids=["instructions", "preferences"],
)
def test_a_node_answers_with_an_update_and_pays_once(tmp_path, model, task, columns, rows):
    config = node(tmp_path, model, task, rows, columns)
    frame = encode_request(first_request(config))
    reply = decode_reply(DeployedNode(config).answer(frame))
    assert isinstance(reply, ClientUpdate)
    assert all(bool(b.any(dim=0).all()) for b in reply.delta.sites.values())  # noise in every column
    assert DeployedNode(config).answer(frame) == DeployedNode(config).answer(frame)
    assert debits(config) == 1


def test_what_a_node_cannot_read_is_told_without_a_record_and_costs_nothing(tmp_path, model, caplog):
    config = node(tmp_path, model, "{kind: causal-lm}", TALKS, "messages: m")  # no chat template
    reply = DeployedNode(config).answer(encode_request(first_request(config)))
    assert not isinstance(decode_reply(reply), ClientUpdate)
    assert debits(config) == 0
    assert not any(word in caplog.text for word in WORDS[:4])
