"""What a network may be: architectures as values, the spaces they are drawn from, their cost and their timm build."""

from search_spaces.arch import ACTIVATIONS, ArchSpec, StageSpec
from search_spaces.cost import Cost, cost
from search_spaces.space import SearchSpace, StageChoices, builtin_spaces, load_space

__all__ = [
    "ACTIVATIONS",
    "ArchSpec",
    "Cost",
    "SearchSpace",
    "StageChoices",
    "StageSpec",
    "builtin_spaces",
    "cost",
    "load_space",
]
