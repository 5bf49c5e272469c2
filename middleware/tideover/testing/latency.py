# SPDX-License-Identifier: Apache-2.0
"""How long a fake provider takes, from the number of tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wait:
    """Seconds until the first token, and from there to the last."""

    first_s: float
    rest_s: float


@dataclass(frozen=True)
class Latency:
    """Time to first token = `base_s` + input tokens × `per_input_token_s`; then output tokens × `per_output_token_s`.

    Both are multiplied by `factor` and by a number drawn evenly from 1 ± `jitter` (0 to 1). An error is sent when the first
    token would have been.
    """

    base_s: float = 0.05
    per_input_token_s: float = 0.0
    per_output_token_s: float = 0.002
    jitter: float = 0.2
    factor: float = 1.0

    def __post_init__(self) -> None:
        if min(self.base_s, self.per_input_token_s, self.per_output_token_s, self.factor) < 0 or not 0 <= self.jitter <= 1:
            raise ValueError(f"latencies are 0 or more and jitter goes from 0 to 1, not {self}")

    def of(self, input_tokens: int, output_tokens: int, *, luck: float, slower: float = 1.0) -> Wait:
        """The waits of one call; `luck` is drawn uniformly from 0 to 1, `slower` multiplies all."""
        scale = self.factor * slower * (1 + self.jitter * (2 * luck - 1))
        first_s = self.base_s + input_tokens * self.per_input_token_s
        return Wait(first_s * scale, output_tokens * self.per_output_token_s * scale)
