"""What a case needs on disk, made from nothing: a model, records, a config. The same for every arm."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from at_scale.cases import ACTORS, Case
from fedlora.config.load import load_config
from fedlora.training.checkpoints import quiet
from fedlora.training.load import load_model

COMMON = """
    time year people way day man thing woman life child world school state family student group country problem
    hand part place case week company system program question work government number night point home water room
    mother area money story fact month lot right study book eye job word business issue side kind head house
"""
WORDS = COMMON.split()
"""Each is one token of MiniLM's."""

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
HIDDEN, RANK = 32, 32
TEST_RECORDS = 8


def make(case: Case, directory: Path) -> None:
    """`directory` holds model/, train.jsonl, test.jsonl, config.yaml and trained.json.

    One site of the tiny model is adapted, `intermediate.dense`, whose B has as many rows as the layer is wide.
    """
    directory.mkdir(parents=True)
    if case.model == "tiny":
        _save_tiny(directory / "model", width=math.ceil(case.megabytes * 1e6 / 4 / RANK))
    shortest, longest = (30, 62) if case.model == "minilm" else (4, 8)  # and two tokens around them
    draw = np.random.default_rng(3)
    for name, count in (("train", case.clients * case.records), ("test", TEST_RECORDS)):
        with (directory / f"{name}.jsonl").open("w") as file:
            file.writelines(_records(count, shortest, longest, draw))
    (directory / "config.yaml").write_text(yaml.safe_dump(_config(case, directory)))
    (directory / "trained.json").write_text(str(_trained(directory / "config.yaml")))


def _trained(path: Path) -> int:
    """How many numbers a client trains."""
    config = load_config(path)
    model = load_model(config.model, config.task, config.lora, ("north", "south"), config.seed)
    return sum(parameter.numel() for parameter in model.trained.values())


def _records(count: int, shortest: int, longest: int, draw: np.random.Generator) -> Iterator[str]:
    for number in range(count):
        words = draw.choice(WORDS, size=draw.integers(shortest, longest, endpoint=True))
        yield json.dumps({"text": " ".join(words), "label": ("north", "south")[number % 2]}) + "\n"


def _config(case: Case, directory: Path) -> dict:
    tiny = case.model == "tiny"
    lora = {"r": RANK if tiny else 8, "lora_alpha": RANK if tiny else 8}
    privacy = {
        "target_epsilon": 8.0,
        "target_delta": 1e-5,
        "max_grad_norm": 1.0,
        "max_participations": case.rounds,
    }
    return {
        "seed": 1,
        "model": {"name": str(directory / "model") if tiny else MINILM},
        "task": {"kind": "sequence-classification"},
        "lora": {**lora, "target_modules": ["intermediate.dense"] if tiny else ["query", "value"]},
        "data": {
            "source": "files",
            "train": str(directory / "train.jsonl"),
            "test": str(directory / "test.jsonl"),
            "text": "text",
            "label": "label",
            "max_length": 64,
            "partition": {"kind": "iid", "clients": case.clients},
        },
        "federation": {
            "rounds": case.rounds,
            "cohort": case.asked,
            "local_steps": case.local_steps,
            "batch_size": case.batch_size,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "evaluate_every": case.rounds,
        },
        "method": {"name": "ffa", "stale": {"beta": case.beta}},  # A stays: the peers know no other
        "privacy": privacy if case.private else "none",
        "runtime": {"kind": "ray", "workers": ACTORS, "clients_together": case.together},
        "output": str(directory / "run"),
    }


def _save_tiny(path: Path, width: int) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=width,
        max_position_embeddings=64,
    )
    torch.manual_seed(11)
    with quiet():
        BertModel(config).save_pretrained(path)
