"""ConvFirst networks under timm's names: `timm.create_model("convfirst", arch_def=..., ...)`.

This file needs timm alone: exported networks contain a copy of it (see `search_spaces.timm_file`).
"""

from __future__ import annotations

from typing import Any

from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models._efficientnet_blocks import UniversalInvertedResidual
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from torch.nn import functional


class PooledShortcut(nn.Module):
    """Input (N, C, H, W) to the shape of a block's output, without parameters.

    The pixels of a stride are averaged, and additional channels are zeros, as in PyramidNet (Han et al. 2017,
    https://arxiv.org/abs/1610.02915); of more channels than the output has, the first ones are taken.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = functional.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        if self.out_channels > self.in_channels:
            return functional.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))
        return x[:, : self.out_channels]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class PooledResidual(UniversalInvertedResidual):
    """timm's block where it has no shortcut of its own, with a pooled one."""

    def forward(self, x: Tensor) -> Tensor:
        # As in timm's block, whose `forward` TorchScript could not call from here.
        shortcut = self.shortcut(x)  # type: ignore[operator]
        x = self.dw_start(x)
        x = self.pw_exp(x)
        x = self.dw_mid(x)
        x = self.se(x)
        x = self.pw_proj(x)
        x = self.dw_end(x)
        x = self.layer_scale(x)
        out: Tensor = self.drop_path(x) + shortcut
        return out


def add_pooled_shortcuts(model: Any) -> None:
    """Give a pooled shortcut to each block of a network that has none; the names of its weights stay the same."""
    for block in (block for stage in model.blocks for block in stage if not block.has_skip):
        # timm's builder takes no class of blocks.
        block.__class__ = PooledResidual
        convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
        stride = max(each.stride[0] for each in convolutions)
        block.shortcut = PooledShortcut(convolutions[0].in_channels, convolutions[-1].out_channels, stride)


def network(
    arch_def: list[list[str]], stem_size: int, num_features: int, act_layer: str, stem_stride: int = 2,
    shortcut: str = "identity", **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """A ConvFirst network of timm's own classes.

    Args:
        arch_def: arch strings of each stage, such as `uir_r2_a3_k0_s2_e4_c64_gs8`.
        stem_size: channels of the stem.
        num_features: channels of the 1x1 convolution after the pool; 0 for none, and no activation.
        act_layer: one of timm's names of activations.
        stem_stride: stride of the stem; timm's own is always 2.
        shortcut: "pooled" for a shortcut around every block, "identity" for timm's own, around those that keep the
            shape.
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
    if shortcut == "pooled":
        add_pooled_shortcuts(model)
    made: nn.Module = model
    return made


def build(
    variant: str, arch_def: list[list[str]], stem_size: int, num_features: int, act_layer: str, stem_stride: int = 2,
    shortcut: str = "identity", **kwargs: Any,
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
    if shortcut != "identity":
        own["shortcut"] = shortcut
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
