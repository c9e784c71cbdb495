"""Requests of the tests. A grammar decides the answer, so a base of any size gives it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

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
