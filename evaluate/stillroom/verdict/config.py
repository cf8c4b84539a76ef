"""What the pipeline tells the verdict stage; the measurements come through the artifacts it reads. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class VerdictConfig(BaseModel):
    """Which variants there are, which of them is judged, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    recipe: str
    """Its name."""
    final: str
    """The stage that is judged."""
    variants: tuple[str, ...]
    """In table order: `dense`, the stages, `baseline:NAME`."""
    gates: tuple[str, ...] = ()
    """As the recipe writes them."""
