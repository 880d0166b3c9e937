"""The choices of a search space as parameters of Optuna's."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.space import Choice


def distribution(choices: Sequence[Choice]) -> BaseDistribution:
    """The distribution of one parameter: ordered for evenly spaced numbers, categories for all other choices."""
    numbers = [choice for choice in choices if isinstance(choice, int | float)]
    if len(numbers) == len(choices) > 1:
        # In binary, 1.4 - 1.2 is a little less than the 0.2 that was meant, and 1.6 would be out of reach.
        decimals = [Decimal(str(number)) for number in numbers]
        steps = {after - before for before, after in pairwise(decimals)}
        if len(steps) == 1:
            step = steps.pop()
            if all(isinstance(number, int) for number in numbers):
                return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(step))
            return FloatDistribution(float(numbers[0]), float(numbers[-1]), step=float(step))
    return CategoricalDistribution(tuple(choices))


def chosen(choices: Sequence[Choice], value: Any) -> Choice:
    """The choice that a sampled value stands for: low + 2 * step is not always exactly the number that was written."""
    if value in choices:
        choice: Choice = value
        return choice
    return min(choices, key=lambda choice: abs(float(choice) - value))
