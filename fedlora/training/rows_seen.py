"""Whether each trained layer can tell one record from the next, found out before a record is paid for."""

from collections.abc import Mapping

from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.training.hearing import hear


def require_row_a_record(
    model: nn.Module, trained: Mapping[str, nn.Parameter], inputs: Mapping[str, Tensor]
) -> None:
    """Passes a model whose every trained layer is given one row for each record, whatever axes come behind it.

    The private step refuses others too, but on a node only after their budget was debited.

    Args:
        model: takes `inputs`.
        trained: parameters of it.
        inputs: of several made-up records, the first axis of each counting them.

    Raises:
        ModelError: names the first layer that folds something else into its first axis, as windows of an image.
    """
    records = len(next(iter(inputs.values())))
    rows: dict[str, int] = {}
    wanted = set(map(id, trained.values()))
    layers = {
        path: module
        for path, module in model.named_modules()
        if any(id(parameter) in wanted for parameter in module.parameters(recurse=False))
    }
    hear(model, layers, inputs, lambda path, given: rows.update({path: len(given)}))
    for path, found in rows.items():
        if found != records:
            raise ModelError(
                f"lora.target_modules: {path!r} is given {found} rows of {records} records, as an image's windows are, "
                "so no record's gradient could be clipped; name other layers, or a model without windows, such as ViT"
            )
