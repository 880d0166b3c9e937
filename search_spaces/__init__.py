"""Architectures as values, the spaces that they are drawn from, their cost, and their networks made by timm.

Import the names below from here and everything else from its own module. This package imports none of `nas`, `kernels`
and `studies`, and only `nas`, `kernels.lab` and tests import it.
"""

from importlib import import_module

import wrapt

from search_spaces.arch import ACTIVATIONS, ArchSpec, StageSpec
from search_spaces.cost import Cost, cost
from search_spaces.ladder import ladder_space
from search_spaces.loading import builtin_spaces, load_space
from search_spaces.space import SearchSpace, StageChoices

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
    "ladder_space",
    "load_space",
]
