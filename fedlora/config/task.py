"""What is learned from a record."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedlora.config.section import Section


class Classification(Section):
    """One label for one text or one pair of texts."""

    kind: Literal["sequence-classification"]
    head: Literal["trained", "frozen"] = "trained"
    """trained: the classifier starts at zero and is clipped, noised and sent with B; frozen: random, as in
    FedSVD's paper."""
    pooler: Literal["checkpoint", "identity"] = "checkpoint"
    """What stands between a BERT-like encoder and its head: the checkpoint's own pooler, or tanh of the
    centred first token. sentence-transformers checkpoints carry an untrained pooler: take identity there."""
    causal: ClassVar[bool] = False
    """Whether the model predicts next tokens."""


class ImageClassification(Section):
    """One label for one image, by any image classifier of transformers whose layers are linear: ViT, DeiT, DINOv2."""

    kind: Literal["image-classification"]
    head: Literal["trained", "frozen"] = "trained"
    """trained: the classifier starts at zero and is clipped, noised and sent with B; frozen: random."""
    causal: ClassVar[bool] = False


class CausalLm(Section):
    """Next-token prediction; the loss is the mean over the trained tokens of one record, so records stay apart.

    On `data.text`, every token is trained; on `data.prompt` and `data.completion`, or `data.messages`, it is
    supervised fine-tuning: prompts are read, completions are learned.
    """

    kind: Literal["causal-lm"]
    template: str | None = None
    """How a prompt and its completion become one text: plain (the one after the other), chat (the tokenizer's chat
    template), or a text of your own that holds {prompt} and is followed by the completion. null: chat for
    `data.messages`, else plain."""
    loss_on: Literal["completion", "all"] | None = None
    """Which tokens are learned: the completion's (of messages, the assistant's), or all. null: completion where there
    is one, else all."""
    packing: bool = False
    """Only false: records packed into one sequence share its gradient, and could not be clipped each by itself."""
    samples: Annotated[int, Field(ge=0)] = 0
    """After the run, so many prompts of the public test records, the first ones, are continued greedily by the model
    before and after training: samples.jsonl and the report."""
    sample_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens of such a continuation at most."""
    causal: ClassVar[bool] = True


class Dpo(Section):
    """Direct preference optimisation (arXiv 2305.18290, equation 7) on `data.prompt`, `data.chosen`, `data.rejected`.

    A record is the pair, clipped as one. The reference is the frozen base model, without the adapter.
    """

    kind: Literal["dpo"]
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How hard the model is held to the reference: the loss is -log sigmoid(beta * margin), the margin in nats."""
    template: str | None = None
    """As for causal-lm: plain (null), chat, or a text with {prompt}."""
    causal: ClassVar[bool] = True


Task = Annotated[Classification | ImageClassification | CausalLm | Dpo, Field(discriminator="kind")]
