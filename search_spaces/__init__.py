"""What a network may be: architectures as values, the spaces they are drawn from, their cost and their timm build."""

from importlib import import_module

import wrapt

from search_spaces.arch import ACTIVATIONS, ArchSpec, StageSpec
from search_spaces.cost import Cost, cost
from search_spaces.space import SearchSpace, StageChoices, builtin_spaces, load_space

# Once timm is there, not before: it takes seconds to import.
wrapt.register_post_import_hook(lambda timm: import_module("search_spaces.timm_models"), "timm")

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
