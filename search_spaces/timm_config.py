"""An architecture as timm's configuration files have one: a JSON that says what to build, and for which images."""

from __future__ import annotations

from typing import Any

from search_spaces.arch import ArchSpec

ARCHITECTURE = "convfirst"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_config(arch: ArchSpec, num_classes: int, resolution: int) -> dict[str, Any]:
    """The fields of timm's hub format; `model_args` are those of `timm.models.MobileNetV3`, the stages as arch strings.

    Args:
        resolution: pixels of the square images it is for.
    """
    return {
        "architecture": ARCHITECTURE,
        "num_classes": num_classes,
        "num_features": arch.head_width,
        "model_args": {
            "arch_def": arch.arch_def, "stem_size": arch.stem_width, "num_features": arch.head_width,
            "act_layer": arch.activation,
        },
        "pretrained_cfg": {
            "num_classes": num_classes, "input_size": [3, resolution, resolution], "pool_size": None,
            "crop_pct": 1.0, "interpolation": "bicubic", "fixed_input_size": False, "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD), "first_conv": "conv_stem", "classifier": "classifier",
        },
        "convfirst": {"arch": str(arch), "arch_id": arch.arch_id},
    }  # fmt: skip
