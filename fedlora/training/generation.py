"""What a causal model says next."""

from collections.abc import Sequence

import torch

from fedlora.training.model import AdaptedModel, transformer_of


@torch.no_grad()
def continued(adapted: AdaptedModel, prompt: Sequence[int], most: int, end: int | None) -> list[int]:
    """At most `most` tokens after the prompt, each the likeliest, up to `end`, which is not among them.

    The model reads no more tokens back than it has positions for. Every token is a pass over all before it: nothing is
    kept between passes, since adapted layers are built for training.

    Args:
        adapted: of a causal task.
        prompt: at least one token.
        most: 1 or more.
        end: the token that ends a text; None: there is none.
    """
    config = transformer_of(adapted.peft_model).config
    window = getattr(config, "max_position_embeddings", None) or len(prompt) + most
    said: list[int] = []
    while len(said) < most:
        tokens = torch.tensor([[*prompt, *said][-window:]], device=adapted.device)
        logits = adapted.peft_model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        token = int(logits[0, -1].argmax())
        if token == end:
            break
        said.append(token)
    return said
