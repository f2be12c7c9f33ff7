"""From records to what a model of the task reads, and how it takes that in: tokens or pixels, chosen here."""

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedModel

from fedlora.config import schema
from fedlora.data.images import images_of
from fedlora.data.records import Examples, Records
from fedlora.data.tokenise import tokenise
from fedlora.training.checkpoints import locate
from fedlora.training.image_recipe import load_recipe
from fedlora.training.intake import Intake
from fedlora.training.pixels import pixel_intake
from fedlora.training.tokens import load_tokenizer, token_intake


def reader_of(*, name: str, max_length: int | None, task_cfg: schema.Task) -> Callable[[Records], Examples]:
    """What makes examples of records, in their order, as the model of this name reads them.

    Its tokenizer or image processor is loaded here, once for however many sets of records.

    Args:
        name: of the model.
        max_length: tokens kept of a text; None of images.
        task_cfg: of the run or the node. Records are of the kind that it reads.

    Raises:
        ModelError: the model is not there, or lacks its tokenizer or image processor.
        DataError: a record cannot be read; raised by what is returned.
    """
    if isinstance(task_cfg, schema.ImageClassification):
        return partial(images_of, frame=load_recipe(locate(name)).frame)
    assert max_length is not None, "config/columns.py asks for it"
    return partial(tokenise, tokenizer=load_tokenizer(name), max_length=max_length, task=task_cfg)


def intake_of(name: str, task_cfg: schema.Task, model: PreTrainedModel) -> Intake:
    """How the model, as `load_base` left it, takes in records.

    Raises:
        ModelError: one record can see another, or an image model lacks its image processor or reads another size.
    """
    if isinstance(task_cfg, schema.ImageClassification):
        return pixel_intake(name, model, locate(name))
    return token_intake(name, model)
