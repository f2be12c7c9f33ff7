"""What every part of a YAML is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the YAML: frozen, strict, closed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
