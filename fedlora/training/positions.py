"""How long a text a model can be given: where it has learnt its places one by one, no longer than that many."""

from collections.abc import Mapping, Sequence

from fedlora.errors import ModelError

LEARNT = ("position_embeddings.weight", "wpe.weight", "embed_positions.weight")
"""Ends of the names of tensors with a row for each place. Models that turn or bias instead have none."""
RESERVED = {"Roberta": 2, "XLMRoberta": 2, "Camembert": 2, "MPNet": 2, "OPT": 2}
"""Rows that are no token's, by how architectures are called."""


def require_positions(architecture: str, shapes: Mapping[str, Sequence[int]], max_length: int | None) -> None:
    """Passes only texts that have a place for each token.

    Args:
        architecture: as transformers calls it.
        shapes: of its tensors, by name.
        max_length: `data.max_length`; None of images.

    Raises:
        ModelError: a text may be longer than the model has places.
    """
    rows = [shape[0] for name, shape in shapes.items() if name.endswith(LEARNT) and len(shape) == 2]
    if max_length is None or not rows:
        return
    reserved = next((count for name, count in RESERVED.items() if architecture.startswith(name)), 0)
    places = min(rows) - reserved
    if max_length > places:
        raise ModelError(
            f"data.max_length: {max_length} tokens, but {architecture} has places for {places}; write {places} or less"
        )
