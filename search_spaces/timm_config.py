"""An architecture as a timm configuration file: JSON that says what to build, and for which images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from search_spaces.arch import IDENTITY, STEM_STRIDE, ArchSpec

ARCHITECTURE = "convfirst"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model_args(arch: ArchSpec) -> dict[str, Any]:
    """The arguments of `search_spaces.timm_models.network`, as plain JSON values."""
    return {
        "arch_def": arch.arch_def, "stem_size": arch.stem_width, "num_features": arch.head_width,
        "act_layer": arch.activation, **({} if arch.stem_stride == STEM_STRIDE else {"stem_stride": arch.stem_stride}),
        **({} if arch.shortcut == IDENTITY else {"shortcut": arch.shortcut}),
    }  # fmt: skip


def timm_config(
    arch: ArchSpec,
    num_classes: int,
    resolution: int,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    notes: Sequence[str] = (),
    **ours: Any,
) -> dict[str, Any]:
    """The fields of timm's hub format, as `timm.models.save_for_hf` writes them.

    Args:
        resolution: height and width in pixels of the images that the network is for.
        mean, std: mean and standard deviation of the images' channels, in 0..1.
        notes: lines that timm keeps with the network.
        ours: further fields, which timm does not read.
    """
    return {
        "architecture": ARCHITECTURE,
        "num_classes": num_classes,
        # timm's word for the features before the head.
        "num_features": arch.stages[-1].width,
        "global_pool": "avg",
        "model_args": {**model_args(arch), "num_classes": num_classes, "in_chans": 3, "global_pool": "avg"},
        "pretrained_cfg": {
            "custom_load": False, "input_size": [3, resolution, resolution], "fixed_input_size": False,
            # As the search evaluates: the shorter side is resized, and the middle is cropped.
            "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
            "mean": list(mean), "std": list(std), "num_classes": num_classes,
            "pool_size": None, "first_conv": "conv_stem", "classifier": "classifier",
            **({"notes": list(notes)} if notes else {}),
        },
        **ours,
    }  # fmt: skip
