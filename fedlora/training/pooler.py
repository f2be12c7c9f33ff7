"""A public stand-in for a pooler that the checkpoint never trained.

BERT-like classifiers read tanh(W h + b) of the first token's state h. Checkpoints that were trained on another read-out
(sentence-transformers average over tokens) carry a W that is noise to a classifier. Here W becomes the identity and b
minus the mean state over words of the vocabulary, each read alone: public, the same for everybody, never trained. The
centring matters: raw first-token states share one large component, on which clipping would waste its bound.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedlora.errors import ModelError

WORDS = 512
GRID = 2.0**-10
"""The mean is rounded to this, so that thread counts and machines do not show in it."""


@torch.no_grad()
def make_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The model's pooler passes the centred first token on; returns the names of the parameters it replaced.

    Raises:
        ModelError: the model has no pooler of one square linear layer.
    """
    path = f"{model.base_model_prefix}.pooler.dense"
    dense = dict(model.named_modules()).get(path)
    if not isinstance(dense, nn.Linear) or dense.in_features != dense.out_features:
        raise ModelError(
            f"task.pooler identity: {type(model).__name__} has no square linear layer {path!r}; write pooler: checkpoint"
        )
    dense.weight.copy_(torch.eye(dense.in_features))
    dense.bias.copy_(-_mean_first_state(model, tokenizer))
    return f"{path}.weight", f"{path}.bias"


def _mean_first_state(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii())
    chosen = words[:: max(1, len(words) // WORDS)][:WORDS] or sorted(tokenizer.get_vocab())[:WORDS]
    rows = tokenizer(chosen, return_attention_mask=False)["input_ids"]
    shortest = min(len(row) for row in rows)  # words that are one token, between the special ones: no padding
    alone = torch.tensor([row for row in rows if len(row) == shortest])
    states = model.base_model(input_ids=alone).last_hidden_state[:, 0]
    return (states.double().mean(dim=0) / GRID).round().mul(GRID)
