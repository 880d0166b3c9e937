"""Batch norms folded into the convolutions before them: what every deployed engine starts from."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (convolution, norm) by the names that timm's `ConvNormAct`, EfficientNet and MobileNet families register them under.
# Order of registration alone would also match a pre-activation network, where the norm belongs to the *next* layer.
PAIRS = (("conv", "bn"), ("conv_stem", "bn1"), ("conv_head", "bn2"), ("conv_head", "norm_head"))


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference whose batch norms are part of the convolutions before them.

    timm's norm layers carry their activation (`BatchNormAct2d`); it stays where the norm was. A norm outside `PAIRS`
    is left as it is, which costs time but not exactness.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("model.training=True: batch norms fold only in evaluation mode")
    folded = copy.deepcopy(model)
    for parent in folded.modules():
        for conv_name, norm_name in PAIRS:
            conv, norm = getattr(parent, conv_name, None), getattr(parent, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
    return folded
