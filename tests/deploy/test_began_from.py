"""Server and node must begin from the same adapter: a node whose files differ stays away, and pays nothing."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedlora.training.checkpoints import base_digest
from fedlora.training.load import load_model
from fedlora.transport.wire import encode_request
from fedlora.values import RefusalReason
from tests.deploy.nodes import reason, without_records


def adapter(directory: Path, config) -> Path:
    """A LoRA of the node's own layers, whose B is not zero, with no head."""
    model = load_model(config.model, config.task, config.lora, tuple(config.classes), 0)
    names = {f"base_model.model.{site}": pair for site, pair in model.live.items()}
    tensors = {f"{name}.lora_A.weight": a.detach().clone() for name, (a, _) in names.items()}
    tensors |= {f"{name}.lora_B.weight": torch.ones(b.shape) for name, (_, b) in names.items()}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": True}
    (directory / "adapter_config.json").write_text(json.dumps(words))
    return directory


def test_an_adapter_that_one_side_alone_began_from_is_refused_before_a_record_is_read(
    config, request_one, tmp_path
):
    given = adapter(tmp_path / "lora", config)
    lora = config.lora.model_copy(update={"from_adapter": str(given)})
    node = without_records(config.model_copy(update={"lora": lora}))
    assert reason(node.answer(encode_request(request_one))) == RefusalReason.BAD_REQUEST
    agreed = base_digest(config.model, lora)
    asked = encode_request(replace(request_one, base_model=agreed))
    assert reason(without_records(config).answer(asked)) == RefusalReason.BAD_REQUEST
    assert reason(node.answer(asked)) == RefusalReason.FAILED  # the records were looked for
    state = load_file(given / "adapter_model.safetensors")
    save_file({name: -tensor for name, tensor in state.items()}, given / "adapter_model.safetensors")
    assert reason(node.answer(asked)) == RefusalReason.BAD_REQUEST
    assert not Path(config.ledger).exists()
