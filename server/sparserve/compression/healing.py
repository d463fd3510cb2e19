"""How a model is healed: what a recipe, or `sparserve heal`, says of it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Heal(BaseModel):
    """Self-distillation: the student learns the logits of the original model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # The policy that will serve, in the words of `--policies`: dense, core:0.5, token:0.48/planes.
    through: Annotated[str, Field(min_length=1, max_length=256)] = "dense"
    tokens: Annotated[int, Field(ge=1, le=10**12)] = 1_000_000  # that are trained on, in all
    window: Annotated[int, Field(ge=16, le=65536)] = 256  # tokens of a sequence
    batch: Annotated[int, Field(ge=1, le=65536)] = 4  # sequences of a step
    # Sequences that the original model writes itself, of as many tokens, for training.
    generated: Annotated[int, Field(ge=0, le=10**7)] = 512
    rank: Annotated[int, Field(ge=0, le=1024)] = 64  # of what is added to each matrix, and merged
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    # Weight of a term that makes few neurons carry most of a token's activations.
    concentrate: Annotated[float, Field(ge=0, le=10)] = 0.0
    held_out: Annotated[int, Field(ge=1, le=4096)] = (
        16  # sequences that are looked at, not trained on
    )
    evaluations: Annotated[int, Field(ge=1, le=10**6)] = 20  # looks at these, evenly spread
    patience: Annotated[int, Field(ge=1, le=10**6)] = 4  # looks without a better one that end a run
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.window)))

    @model_validator(mode="after")
    def _must_train_something(self) -> Self:
        if self.evaluations > self.steps:
            raise ValueError(
                f"evaluations is {self.evaluations}, and {self.tokens} tokens are {self.steps} steps of "
                f"{self.batch} x {self.window}; give more tokens, or fewer evaluations"
            )
        return self
