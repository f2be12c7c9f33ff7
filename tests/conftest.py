"""A model and data small enough for any machine, made by the tests themselves."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_worker_niceness", "0")  # else a Ray worker starves beside another test's process

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything imports Triton: its kernels then run on tensors of a core
    )

import yaml
from hypothesis import settings

from fedlora.config.load import load_config
from fedlora.config.schema import RunConfig

settings.register_profile("fedlora", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fedlora")
torch.set_num_threads(1)

WORDS = {
    "weather": ["rain", "wind", "cloud", "sun", "storm", "snow", "fog", "warm", "cold", "thunder"],
    "kitchen": ["bread", "salt", "pan", "oven", "knife", "soup", "butter", "plate", "spoon", "bake"],
    "music": ["drum", "violin", "song", "choir", "rhythm", "piano", "tune", "melody", "bass", "horn"],
}
COMMON = [
    "the",
    "a",
    "and",
    "with",
    "very",
    "some",
    "near",
    "under",
    "old",
    "new",
    "good",
    "bad",
    "big",
    "small",
]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with a tokenizer of whole words, saved as any local model is."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = sorted({word for group in WORDS.values() for word in group} | set(COMMON))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # a random encoder has to tell words apart
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def topic_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train (360) and test (90) sentences about three topics, as tsv."""
    path = tmp_path_factory.mktemp("topics")
    draw = np.random.default_rng(5)
    rows = []
    for topic, words in WORDS.items():
        for number in range(150):
            own = draw.choice(words, size=3 + number % 4)
            filler = draw.choice(COMMON, size=2 + number % 7)
            rows.append(
                (topic, " ".join(draw.permutation([*own, *filler])), ("north", "south", "east")[number % 3])
            )
    rows = [rows[i] for i in draw.permutation(len(rows))]
    for name, part in (("train", rows[:360]), ("test", rows[360:])):
        lines = ["\t".join(("topic", "sentence", "site")), *("\t".join(row) for row in part)]
        (path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return path / "train.tsv", path / "test.tsv"


@pytest.fixture
def tiny_config(
    tmp_path: Path, tiny_encoder: Path, topic_files: tuple[Path, Path]
) -> Callable[..., RunConfig]:
    """Builds a private run of a few seconds; keyword arguments are dotted keys with `__` for the dot."""
    train, test = topic_files
    text = {
        "seed": 7,
        "model": {"name": str(tiny_encoder)},
        "task": {"kind": "sequence-classification"},
        "lora": {"r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]},
        "data": {
            "source": "files",
            "train": str(train),
            "test": str(test),
            "text": "sentence",
            "label": "topic",
            "max_length": 16,
            "partition": {"kind": "dirichlet", "clients": 3, "alpha": 1.0, "min_examples": 40},
        },
        "federation": {
            "rounds": 3,
            "cohort": 2,
            "local_steps": 2,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "lr": 1.0},
        },
        "method": {"name": "fedsvd"},
        "privacy": {
            "target_epsilon": 8.0,
            "target_delta": 1e-5,
            "max_grad_norm": 1.0,
            "max_participations": 3,
        },
        "runtime": {"kind": "local"},
        "output": str(tmp_path / "run"),
    }

    def build(**changes: object) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(text))
        # JSON is YAML, so every value can be written as --set would have it.
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return load_config(path, overrides)

    return build
