"""ConvFirst networks under timm's names: `timm.create_model("convfirst", arch_def=..., ...)`.

This file needs timm alone: exported networks contain a copy of it (see `search_spaces.timm_file`).
"""

from __future__ import annotations

from typing import Any

from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn


def network(
    arch_def: list[list[str]], stem_size: int, num_features: int, act_layer: str, stem_stride: int = 2, **kwargs: Any
) -> nn.Module:
    """A ConvFirst network of timm's own classes.

    Args:
        arch_def: arch strings of each stage, such as `uir_r2_a3_k0_s2_e4_c64_gs8`.
        stem_size: channels of the stem.
        num_features: channels of the 1x1 convolution after the pool; 0 for none, and no activation.
        act_layer: one of timm's names of activations.
        stem_stride: stride of the stem; timm's own is always 2.
        kwargs: further arguments of timm's MobileNetV3: `num_classes`, `in_chans`, `drop_path_rate`, ...
    """
    # The builder takes activations by name, and the rest of the network does not.
    model: Any = MobileNetV3(
        decode_arch_def(arch_def), stem_size=stem_size, num_features=num_features or 8,
        act_layer=get_act_layer(act_layer), **kwargs,
    )  # fmt: skip
    if not num_features:
        model.conv_head, model.act2 = nn.Identity(), nn.Identity()
        model.head_hidden_size = model.num_features
        model.reset_classifier(model.num_classes, model.global_pool.pool_type)
    if stem_stride == 1:
        model.conv_stem.stride = (1, 1)
        for features in model.feature_info:
            features["reduction"] //= 2
    made: nn.Module = model
    return made


def build(
    variant: str, arch_def: list[list[str]], stem_size: int, num_features: int, act_layer: str, stem_stride: int = 2,
    **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """A network as `network` makes it, with what timm adds to a registered one.

    Args:
        variant: the registered name.
        kwargs: arguments that any timm model takes: `pretrained`, `num_classes`, `in_chans`, `drop_path_rate`,
            `features_only`, ...
    """
    own: dict[str, Any] = dict(arch_def=arch_def, stem_size=stem_size, num_features=num_features, act_layer=act_layer)
    if stem_stride != 2:
        own["stem_stride"] = stem_stride
    # timm's builder offers the features before each stage that begins with a stride, and the last; by default timm
    # asks for five of them, however many there are.
    taps = 1 + sum(blocks[0]["stride"] > 1 for blocks in decode_arch_def(arch_def))
    model: nn.Module = build_model_with_cfg(
        network,
        variant,
        pretrained=kwargs.pop("pretrained", False),
        # The getter runs the classifier's own network; timm's MobileNetV3Features is another one.
        feature_cfg=dict(out_indices=tuple(range(taps)), feature_cls="getter"),
        **own,
        **kwargs,
    )
    # What timm saves names the architecture "convfirst", which can be built wherever this file is, whatever the
    # network's own name is.
    made: Any = model
    made.pretrained_cfg["architecture"] = "convfirst"
    made._model_args = own
    return model


default_cfgs = generate_default_cfgs({"convfirst": dict(first_conv="conv_stem", classifier="classifier")})


def convfirst(**kwargs: Any) -> nn.Module:
    """Any ConvFirst network: its `arch_def`, `stem_size`, `num_features` and `act_layer` are in its config.json."""
    return build("convfirst", **kwargs)


# Several copies of this file may be imported; they are the same, and the first one registers.
if not is_model("convfirst"):
    register_model(convfirst)
