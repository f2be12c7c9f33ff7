"""Whole private runs on completions and on pairs: the loss falls where it can, and what was asked is handed over."""

import json
import statistics

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.cli.app import main
from fedlora.config.load import dump_config
from fedlora.export.samples import write_samples
from fedlora.runs.rundir import run_config, run_rounds, run_samples
from fedlora.runs.trained import trained_adapters

COLOURS = ["red", "blue", "green", "pink"]
SAID = ["apple", "sky", "leaf", "rose"]
MARKUP = "<b>bold</b>"
WORDS = [*COLOURS, *SAID, "what", "is", "?", MARKUP]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A causal model over whole words, and records: a colour, what has it, and what has not."""
    path = tmp_path_factory.mktemp("causal")
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(path / "model")
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(path / "model")
    draw = np.random.Generator(np.random.Philox(1))
    for name, count in (("train", 300), ("test", 40)):
        rows = []
        for number in draw.integers(0, 4, size=count).tolist():
            other = SAID[(number + 1 + int(draw.integers(0, 3))) % 4]
            prompt = f"what is {COLOURS[number]} {MARKUP if name == 'test' else ''} ? "
            rows.append({"prompt": prompt, "good": SAID[number], "bad": other})
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tiny_config, place, folder, task, columns, **changes):
    config = tiny_config(
        model__name=str(place / "model"), task=task, lora__target_modules=["q_proj", "v_proj", "down_proj"],
        data={
            "source": "files", "train": str(place / "train.jsonl"), "test": str(place / "test.jsonl"),
            "max_length": 12, "partition": {"kind": "iid", "clients": 3}, **columns,
        },
        federation__rounds=4, federation__cohort=3, federation__batch_size=32, privacy__max_participations=4,
        federation__local_steps=2,
        output=str(folder / "run"), **changes,
    )  # fmt: skip
    (folder / "task.yaml").write_text(dump_config(config))
    return str(folder / "task.yaml"), folder / "run"


def command(*words):
    return main(list(words))


def test_instructions_are_learned_in_private_and_the_run_shows_what_the_model_says(
    tiny_config, place, tmp_path, capsys
):
    path, run_dir = run(
        tiny_config, place, tmp_path, {"kind": "causal-lm", "samples": 3, "sample_tokens": 2},
        {"prompt": "prompt", "completion": "good"}, federation__optimizer__lr=8.0,
    )  # fmt: skip
    assert command("simulate", path) == 0
    rounds = run_rounds(run_dir)
    assert rounds[-1]["metric"] == "perplexity"
    assert rounds[-1]["loss"] < 0.8 * rounds[0]["loss"]
    assert rounds[-1]["epsilon_max"] <= 8.0
    samples = run_samples(run_dir)
    assert len(samples) == 3
    _, b = next(iter(trained_adapters(run_dir)[0].sites.items()))
    assert b.b.any()
    config, begun = run_config(run_dir), {"from_adapter": str(tmp_path / "gone")}
    config = config.model_copy(update={"lora": config.lora.model_copy(update=begun)})
    write_samples(tmp_path / "again.jsonl", config, trained_adapters(run_dir)[0])
    assert (tmp_path / "again.jsonl").read_bytes() == (run_dir / "samples.jsonl").read_bytes()
    report = (run_dir / "report.html").read_text()
    assert "What the model says" in report and "After training" in report
    assert MARKUP not in report and "&lt;b&gt;" in report
    _same_as_plain_transformers(place, run_dir, samples)


def _same_as_plain_transformers(place, run_dir, samples):
    """The exported adapter says the same through transformers and PEFT alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    rows = [json.loads(line)["prompt"] for line in (place / "test.jsonl").read_text().splitlines()[:3]]

    def says(prompt):
        ids = tokenizer("<s> " + prompt, return_tensors="pt")["input_ids"][
            :, 1:
        ]  # this tokenizer begins no text
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
        )
        return tokenizer.decode(whole[0][ids.shape[1] :], skip_special_tokens=True)

    before = [says(prompt) for prompt in rows]
    model = PeftModel.from_pretrained(model, run_dir / "adapter")
    after = [says(prompt) for prompt in rows]
    assert [sample["before"].strip() for sample in samples] == [text.strip() for text in before]
    assert [sample["after"].strip() for sample in samples] == [text.strip() for text in after]
    assert before != after


def test_preferences_are_learned_in_private_by_clients_one_by_one(tiny_config, place, tmp_path, caplog):
    """Asked to share passes, they cannot: their records are two sequences, which the log tells."""
    path, run_dir = run(
        tiny_config, place, tmp_path, {"kind": "dpo", "beta": 0.5},
        {"prompt": "prompt", "chosen": "good", "rejected": "bad"},
        federation__optimizer__lr=8.0, runtime__clients_together=3,
    )  # fmt: skip
    assert command("simulate", path) == 0
    rounds = run_rounds(run_dir)
    assert rounds[0]["metric"] == "accuracy" and rounds[0]["score"] == 0.5
    assert rounds[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    # The mean of three: one round falls back by chance under this noise, which is another where files lie elsewhere.
    assert statistics.fmean(line["score"] for line in rounds[2:]) > 0.6, "chance is a half"
    assert statistics.fmean(line["loss"] for line in rounds[2:]) < 0.6
    assert rounds[-1]["epsilon_max"] <= 8.0
    assert all(len(line["answered"]) == 3 for line in rounds[1:])
    assert "records of two sequences (task.kind: dpo); clients train one by one" in caplog.text
