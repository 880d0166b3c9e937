"""Folding of batch norms into the convolutions before them, the first step of every deployed engine."""

from __future__ import annotations

import copy
from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def _applied_as_registered() -> tuple[type[nn.Module], ...]:
    """timm's classes that apply their layers in the order in which they register them.

    In any other class the order means nothing: in a pre-activation block a norm belongs to the *next* convolution.
    """
    from timm.layers import ConvNormAct
    from timm.models import EfficientNet, MobileNetV3, _efficientnet_blocks

    return (
        ConvNormAct, EfficientNet, MobileNetV3, _efficientnet_blocks.ConvBnAct,
        _efficientnet_blocks.DepthwiseSeparableConv, _efficientnet_blocks.EdgeResidual,
        _efficientnet_blocks.InvertedResidual,
    )  # fmt: skip


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Copy a model for inference, with its batch norms folded into the convolutions before them.

    timm's norm layers hold their activation (`BatchNormAct2d`); it stays where the norm was. A norm outside of timm's
    efficient networks and blocks is left as it is, which costs time but not exactness.

    Args:
        model: the model, in evaluation mode; it is left as it is.

    Raises:
        ValueError: the model is in training mode.
    """
    if model.training:
        raise ValueError("model.training=True: batch norms fold only in evaluation mode")
    folded = copy.deepcopy(model)
    for parent in folded.modules():
        if not isinstance(parent, _applied_as_registered()):
            continue
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, getattr(norm, "act", nn.Identity()))
    return folded
