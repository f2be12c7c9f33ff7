"""What the server can see of training before and while clients train, with public records and made-up ones alone.

Nothing here touches a client's records: an error that depends on them would tell of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch

from fedlora.config.schema import Privacy
from fedlora.data.records import Examples
from fedlora.errors import ModelError
from fedlora.privacy.direct_engine import DirectEngine
from fedlora.training.model import AdaptedModel
from fedlora.training.prefix import kept, made_up, redraw
from fedlora.training.tasks import losses
from fedlora.values import Adapters

CLIP_SHARE = "public_clip_share"
"""Of public test records, the part whose gradient is longer than max_grad_norm; no word on anybody's own records."""

MOST_RECORDS = 32
"""Of the public test data for a share of clipped gradients: within a tenth or so, at the price of a hundred passes."""


def require_gradients(adapted: AdaptedModel, start: Adapters) -> None:
    """Passes a model whose every trained tensor changes what it puts out; it computes with `start` afterwards.

    One backward pass over made-up tokens of the vocabulary. What is trained is random for it, since at the start of a
    run zeros in B and in the head keep gradients from each other.

    Args:
        adapted: as loaded for the run.
        start: what the run goes on from; frozen parts are taken from it.

    Raises:
        ModelError: some tensor has no gradient, or one that is zero or not finite; names the modules.
    """
    adapted.load(start)
    trained = adapted.trained_on("both" if adapted.trains_a else "b")
    with kept(adapted), torch.enable_grad():
        redraw(adapted)
        logits = adapted.peft_model(**made_up(adapted)).logits.float()
        # Cross entropy with some class of each row: equal weights would cancel in a softmax.
        targets = torch.arange(logits[..., 0].numel(), device=logits.device) % logits.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    idle = [
        name
        for name, gradient in zip(trained, found, strict=True)
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any())
    ]
    if idle:
        raise ModelError(
            f"lora.target_modules: {', '.join(map(repr, idle[:3]))}{f' and {len(idle) - 3} more' if idle[3:] else ''} "
            "cannot be trained: the gradient is zero or not finite, whatever the adapters are; name modules that the "
            "model's output depends on"
        )


def public_clip_share(adapted: AdaptedModel, public: Examples, max_grad_norm: float) -> float:
    """In [0, 1]: of the first public records, the part whose gradient is longer than `max_grad_norm`.

    Of the model as it is, and of all that any round trains. The clients' own share is private and is never asked for;
    where their records are like the public ones it is like this one.

    Args:
        adapted: with the adapters of the round.
        public: test records; no client's.
        max_grad_norm: the clip.
    """
    few = np.arange(min(MOST_RECORDS, len(public)))
    trained = adapted.trained_on("both" if adapted.trains_a else "b")
    with torch.enable_grad():
        norms = DirectEngine().public_norms(
            adapted.peft_model, trained, losses(adapted, public, few), public.sequences_per_record
        )
    return float((norms > max_grad_norm).double().mean())


def clipped(adapted: AdaptedModel, public: Examples, privacy: Privacy | Literal["none"]) -> dict[str, float]:
    """`public_clip_share` under its name in a round's line; nothing where nobody clips."""
    if privacy == "none":
        return {}
    return {CLIP_SHARE: public_clip_share(adapted, public, privacy.max_grad_norm)}


def clip_note(rounds: Iterable[Mapping[str, Any]], privacy: Privacy | Literal["none"]) -> str | None:
    """What it suggests that in all of these rounds none of the public gradients was clipped, or every one; else None.

    Args:
        rounds: as in rounds.jsonl; the zero-step model is left aside, since zeros in it keep gradients short.
        privacy: of the run.
    """
    shares = {line[CLIP_SHARE] for line in rounds if line["round"] > 0 and CLIP_SHARE in line}
    if privacy == "none" or shares not in ({0.0}, {1.0}):
        return None
    clip = f"privacy.max_grad_norm {privacy.max_grad_norm:g}"
    if shares == {0.0}:
        return (
            f"{clip} clipped none of the public test records in any round: noise grows with it, so a lower one may "
            "learn more at the same epsilon"
        )
    return (
        f"{clip} clipped all of the public test records in every round: each counts by its direction alone, and a "
        "lower one with a learning rate raised as much does the same"
    )
