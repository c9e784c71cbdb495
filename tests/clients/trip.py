"""What the tests ask for: the grammar holds the answer, so a base of any size gives one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["PLAN", "WEATHER", "Trip"]

PLAN = "Plan a trip to Rome by train, three days."
WEATHER = "What is the weather like in Oslo?"


class Trip(BaseModel):
    """A trip"""

    model_config = ConfigDict(
        extra="forbid"
    )  # else a schema allows more, and a small base writes it

    city: Literal["Oslo", "Rome", "Lima"]
    days: int = Field(ge=1, le=9)
    by_train: bool
