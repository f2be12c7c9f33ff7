"""A task says which columns it reads; what does not fit is told with the key and the next move, of a run and a node."""

from pathlib import Path

import pytest

from fedlora.config.columns import form_of, read_columns
from fedlora.config.load import config_digest, load_config, load_node
from fedlora.errors import ConfigError

RUN = """
seed: 1
model: {name: tiny}
task: {kind: causal-lm}
lora: {r: 2, lora_alpha: 2, target_modules: [q_proj]}
data: {source: files, train: a.jsonl, test: b.jsonl, max_length: 8, partition: {kind: iid, clients: 2}}
federation: {rounds: 1, cohort: 2, local_steps: 1, batch_size: 2, optimizer: {name: sgd, lr: 1.0}}
method: {name: fedsvd}
privacy: {target_epsilon: 8.0, target_delta: 1.0e-5, max_grad_norm: 1.0, max_participations: 1}
runtime: {kind: local}
output: runs/x
"""
NODE = """
client: one
data: {source: files, train: a.jsonl, max_length: 8}
declared_records: 100
model: {name: tiny}
task: {kind: causal-lm}
lora: {r: 2, lora_alpha: 2, target_modules: [q_proj]}
work: {batch_size: 2, local_steps: 1, optimizer: {name: sgd, lr: 1.0}}
ledger: ledger.jsonl
budget: {target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: 1}
max_grad_norm: 1.0
min_noise_multiplier: 0.5
"""
DPO = ("task={kind: dpo}",)
ASK = ("data.prompt=q", "data.completion=a")
TALK = ("data.messages=m",)
CLASSIFY = ("task={kind: sequence-classification}", "data.label=y")
HUB = "data={source: huggingface, path: x, text: t, max_length: 8, partition: {kind: iid, clients: 2}, "


def run(folder, *overrides):
    path = folder / "run.yaml"
    path.write_text(RUN)
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "form", "columns"),
    [
        (("data.text=t",), "text", ("t",)),
        (("data.text=[t, u]",), "text", ("t", "u")),
        ((*CLASSIFY, "data.text=[t, u]"), "text", ("t", "u")),
        (ASK, "completion", ("q", "a")),
        (TALK, "messages", ("m",)),
        ((*DPO, "data.prompt=q", "data.chosen=c", "data.rejected=r"), "preference", ("q", "c", "r")),
    ],
)
def test_each_task_has_its_columns(tmp_path, overrides, form, columns):
    data = run(tmp_path, *overrides).data
    assert (form_of(data), read_columns(data)) == (form, columns)
    (tmp_path / "node.yaml").write_text(NODE)
    of_node = load_node(
        tmp_path / "node.yaml", [*overrides, *(["classes=[a, b]"] if CLASSIFY[0] in overrides else [])]
    )
    assert read_columns(of_node.data) == columns


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        ((), "data.text", "missing, but task.kind is causal-lm; write data.text, or data.prompt and data.completion"),
        (("data.prompt=q",), "data.prompt", "prompt together, but causal-lm reads"),
        ((*ASK, "data.text=t"), "data.text", "text, prompt, completion together"),
        ((*ASK, *TALK), "data.prompt", "prompt, completion, messages together"),
        ((*DPO, *ASK), "data.prompt", "dpo reads data.prompt and data.chosen and data.rejected"),
        (DPO, "data.prompt", "missing, but task.kind is dpo"),
        ((*CLASSIFY, *ASK), "data.prompt", "sequence-classification reads data.text"),
        ((*ASK, "task.packing=true"), "task.packing", "cannot be clipped record by record; write false"),
        (("data.text=t", "task.loss_on=completion"), "task.loss_on", "data.text has none; write all"),
        (("data.text=t", "task.template=plain"), "task.template", "no prompt to put into it; write null"),
        ((*ASK, "task.template=Q"), "task.template", "does not hold {prompt}"),
        ((*TALK, "task.template=plain"), "task.template", "many turns; write chat"),
        ((*DPO, "data.prompt=q", "data.chosen=c", "data.rejected=r", "task.template=Q"), "task.template", "{prompt}"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_the_key_and_the_next_move_in_a_run_and_on_a_node(
    tmp_path, overrides, key, said
):
    (tmp_path / "node.yaml").write_text(NODE)
    classes = ["classes=[a, b]"] if CLASSIFY[0] in overrides else []
    for load in (
        lambda: run(tmp_path, *overrides),
        lambda: load_node(tmp_path / "node.yaml", [*overrides, *classes]),
    ):
        with pytest.raises(ConfigError) as caught:
            load()
        assert any(f": {key}: " in line and said in line for line in str(caught.value).splitlines()), (
            caught.value
        )


def test_docstrings_have_no_preferences_and_samples_need_prompts(tmp_path):
    docstrings = "data={source: docstrings, max_length: 8, partition: {kind: iid, clients: 2}}"
    with pytest.raises(ConfigError, match="this source holds texts only; write source: files"):
        run(tmp_path, *DPO, docstrings)
    assert run(tmp_path, docstrings).task.kind == "causal-lm"
    with pytest.raises(ConfigError, match=r"task\.samples: data\.text has no prompts"):
        run(tmp_path, "data.text=t", "task.samples=3")


def test_a_stream_needs_to_know_how_much_to_read(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.max_train_examples: missing, but data\.streaming is true"):
        run(tmp_path, HUB + "streaming: true}")
    assert run(tmp_path, HUB + "streaming: true, max_train_examples: 9}").data.max_train_examples == 9


def test_private_records_are_no_test_records(tmp_path):
    """Scores, losses and samples of test records are told exactly; without privacy that is nobody's secret."""
    same, split = ("data.text=t", f"data.test={Path.cwd()}/./a.jsonl"), HUB + "test_split: train}"
    with pytest.raises(ConfigError, match=r"data\.test: .*a\.jsonl is data\.train itself, .*; name a file"):
        run(tmp_path, *same)
    with pytest.raises(
        ConfigError, match=r"data\.test_split: train holds records of data\.train_split train, .*; name"
    ):
        run(tmp_path, split)
    assert run(tmp_path, *same, "privacy=none").data.test.endswith("a.jsonl")
    assert run(tmp_path, split, "privacy=none").data.test_split == "train"
    for train, test in (
        ("train", "train[:9]"),
        ("train[:9]", "train"),
        ("train", "test+ train"),
        ("train", "all"),
    ):
        with pytest.raises(
            ConfigError, match=r"data\.test_split: .* holds records of data\.train_split train"
        ):
            run(tmp_path, HUB + f"train_split: '{train}', test_split: '{test}'}}")
    apart = HUB + "train_split: 'train[:90%]', test_split: 'train[90%:]+test'}"
    assert run(tmp_path, apart).data.test_split == "train[90%:]+test"


def test_new_keys_at_their_defaults_leave_a_run_what_it_was_and_others_do_not(tmp_path):
    text = run(tmp_path, "data.text=t")
    # Of this very run before there were such keys: printed by the version that knew data.text alone.
    assert config_digest(text) == "b648ec754087ae85e40a890b2b0ad9bb186fa976300a0879daa160da87ad782a"
    said = run(tmp_path, "data.text=t", "task.packing=false", "task.samples=0", "task.sample_tokens=7")
    assert config_digest(said) == config_digest(text)
    asked = run(tmp_path, *ASK)
    assert config_digest(run(tmp_path, *ASK, "task.samples=3")) == config_digest(asked)
    assert len({config_digest(c) for c in (text, asked, run(tmp_path, *ASK, "task.template=chat"))}) == 3
