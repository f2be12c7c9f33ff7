"""Small random models whose per-example gradients are known: a perceptron, BERT and Llama with LoRA."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, what is trained in it, and the losses of any of its records."""

    model: nn.Module
    trained: dict[str, nn.Parameter]
    records: int
    losses: Callable[[Tensor], Tensor]

    def micro_batches(self, size: int | None = None, of: Tensor | None = None) -> list[Callable[[], Tensor]]:
        drawn = torch.arange(self.records) if of is None else of
        parts = drawn.split(size or max(1, len(drawn))) if len(drawn) else ()
        return [lambda part=part: self.losses(part) for part in parts]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def perceptron(
    seed: int = 0, records: int = 12, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Case:
    """Two trained layers with biases between frozen ones; one applied twice."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    model[0].requires_grad_(False)
    x, y = scale * torch.randn(records, 5, dtype=dtype), torch.randint(3, (records,))

    def losses(drawn: Tensor) -> Tensor:
        once = model[3](model[2](model[1](model[0](x[drawn]))))
        return nn.functional.cross_entropy(model[4](model[3](model[2](once))), y[drawn], reduction="none")

    return Case(model, trainable(model), records, losses)


def pairs(seed: int = 0, records: int = 6, tokens: int = 4) -> Case:
    """Trained layers, biases and a layer applied twice; a record is two rows, which its one loss brings together."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    model[0].requires_grad_(False)
    x = torch.randn(records, 2, tokens, 5)

    def losses(drawn: Tensor) -> Tensor:
        rows = x[drawn].flatten(0, 1)
        once = model[3](model[2](model[1](model[0](rows))))
        scores = model[4](model[3](model[2](once))).sum(dim=(1, 2)).view(-1, 2)
        return -nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])

    return Case(model, trainable(model), records, losses)


def bert(seed: int = 0, records: int = 7) -> Case:
    """A two-layer classifier with a padding mask, LoRA's B on query and value, and a trained head."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=["query", "value"])
    model = _only_b(get_peft_model(BertForSequenceClassification(config), lora)).train()
    ids, labels = torch.randint(1, 50, (records, 9)), torch.randint(3, (records,))
    mask = (torch.arange(9)[None] < torch.randint(2, 10, (records, 1))).long()

    def losses(drawn: Tensor) -> Tensor:
        logits = model(input_ids=ids[drawn], attention_mask=mask[drawn]).logits
        return nn.functional.cross_entropy(logits, labels[drawn], reduction="none")

    return Case(model, trainable(model), records, losses)


def llama(seed: int = 0, records: int = 6) -> Case:
    """A two-layer causal model; the loss is the mean over the tokens of one record."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    model = _only_b(get_peft_model(LlamaForCausalLM(config), lora)).train()
    ids, lengths = torch.randint(1, 40, (records, 10)), torch.randint(3, 11, (records, 1))
    mask = (torch.arange(10)[None] < lengths).long()

    def losses(drawn: Tensor) -> Tensor:
        logits = model(input_ids=ids[drawn], attention_mask=mask[drawn]).logits[:, :-1]
        token = nn.functional.cross_entropy(logits.transpose(1, 2), ids[drawn, 1:], reduction="none")
        kept = mask[drawn, 1:]
        return (token * kept).sum(dim=1) / kept.sum(dim=1)

    return Case(model, trainable(model), records, losses)


def _only_b(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
        if "lora_B" in name:  # PEFT's zeros would hide a wrong gradient of the layers below
            nn.init.normal_(parameter, std=0.3)
    return model


def one_at_a_time(case: Case, max_grad_norm: float | None) -> dict[str, Tensor]:
    """The definition: each record alone through plain autograd, clipped jointly, added up in float64."""
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in case.trained.items()}
    for record in range(case.records):
        loss = case.losses(torch.tensor([record]))[0]
        gradients = torch.autograd.grad(loss, list(case.trained.values()))
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        factor = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / float(norm))
        for name, gradient in zip(case.trained, gradients, strict=True):
            total[name] += factor * gradient.double()
    return total
