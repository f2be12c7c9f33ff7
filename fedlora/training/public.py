"""What can be learnt about a pretrained model from public records alone: rows of words drawn from its own vocabulary,
or for an image model soft blots of colour (`pixels.py`).

Hidden states of a transformer share one large component whatever the text. It says nothing about a record, but it
dominates gradients, and clipping would spend its bound on it. Two places can be rid of it for free, since random
words of the vocabulary show it as well as any text: the pooler of a classifier, and the first rows of A.
"""

from collections.abc import Callable, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedlora.errors import ModelError
from fedlora.kernels.quantised import QuantisedLinear
from fedlora.training.hearing import hear

ROWS, WORDS = 256, 12
SEED = 0
"""Fixed: the text is a constant of the vocabulary, the same on every machine and in every run."""


def public_rows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids (256, 12 and special tokens) of random words; of equal length, so nothing is padded."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(word for word in vocabulary if word.isalpha() and word.isascii() and len(word) > 1)
    ids = torch.tensor([vocabulary[word] for word in words or sorted(vocabulary)])
    draw = torch.Generator().manual_seed(SEED)
    drawn = ids[torch.randint(len(ids), (ROWS, WORDS), generator=draw)]
    special = tokenizer("")["input_ids"]  # such as [CLS] and [SEP], or nothing
    before = torch.tensor(special[: (len(special) + 1) // 2], dtype=torch.long)
    after = torch.tensor(special[(len(special) + 1) // 2 :], dtype=torch.long)
    return torch.cat([before.expand(ROWS, -1), drawn, after.expand(ROWS, -1)], dim=1)


@torch.no_grad()
def make_identity_pooler(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The pooler passes on the centred first token: tanh(h - mean h over public rows).

    BERT-like classifiers read tanh(W h + b) of the first token's state h. Checkpoints trained on another read-out
    (sentence-transformers average over tokens) carry a W that is noise to a classifier.

    Returns:
        The names of the parameters replaced, which an exported adapter must carry.

    Raises:
        ModelError: the model has no pooler of one square linear layer.
    """
    path = f"{model.base_model_prefix}.pooler.dense"
    dense = dict(model.named_modules()).get(path)
    if not isinstance(dense, nn.Linear) or dense.in_features != dense.out_features:
        raise ModelError(
            f"task.pooler identity: {type(model).__name__} has no square linear layer {path!r}; "
            f"write pooler: checkpoint"
        )
    first = model.base_model(input_ids=public_rows(tokenizer)).last_hidden_state[:, 0]
    dense.weight.copy_(torch.eye(dense.in_features))
    dense.bias.copy_(-first.double().mean(dim=0))
    return f"{path}.weight", f"{path}.bias"


def mean_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], public: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mean input (d_in,) of each of `layers` over all tokens of the public inputs, float64."""
    return _of_inputs(model, layers, public, lambda inputs: inputs.mean(dim=0))


def input_directions(
    model: nn.Module, layers: Mapping[str, nn.Module], public: Mapping[str, Tensor], r: int
) -> dict[str, Tensor]:
    """Orthonormal rows (r, d_in) along which the inputs of each of `layers` vary most over the public inputs.

    Float64, the strongest first: EVA (arXiv 2410.07170), less the mean, on public records only.
    """

    def strongest(inputs: Tensor) -> Tensor:
        centred = inputs - inputs.mean(dim=0)
        return leading(torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T, r)

    return _of_inputs(model, layers, public, strongest)


def weight_directions(layers: Mapping[str, nn.Module], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The first r left (r, d_out) and right (r, d_in) singular vectors of each frozen weight, float64, as rows.

    PiSSA's subspace (arXiv 2404.02948) at unit scale: the weight itself is left alone.
    """
    found = {}
    for name, layer in layers.items():
        u, _, v = torch.linalg.svd(frozen_weight(layer).double(), full_matrices=False)
        found[name] = leading(u.T, r), leading(v, r)
    return found


def frozen_weight(layer: nn.Module) -> Tensor:
    """(d_out, d_in) of the layer that an adapter stands beside."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if isinstance(base, QuantisedLinear):
        return base.dense(torch.float64)
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(base, Conv1D) else weight.detach()


def leading(rows: Tensor, r: int) -> Tensor:
    """The first r rows; the sign that a decomposition leaves open makes the largest entry of each positive."""
    first = rows[:r]
    largest = first.gather(1, first.abs().argmax(dim=1, keepdim=True))
    return first * largest.sign()


def _of_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    public: Mapping[str, Tensor],
    function: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What `function` makes of each layer's inputs (tokens, d_in), float64, over the public inputs."""
    found: dict[str, Tensor] = {}

    def keep(name: str, given: Tensor) -> None:
        found[name] = function(given.double().flatten(0, -2))

    hear(model, layers, public, keep)
    return found
