"""Fused Triton kernels for timm's ConvFirst networks (`kernels.fuse(model)`), and the one place that times.

Import `fuse` and `FusedNetwork` from here and everything else from its own module. This package imports none of `nas`,
`search_spaces` and `studies`. Triton is imported with the first kernel, so that `TRITON_INTERPRET=1` may still be set
before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.network import FusedNetwork, fuse

__all__ = ["FusedNetwork", "fuse"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kernels import network

        return getattr(network, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
