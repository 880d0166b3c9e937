from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from kernels.fold import fold_batch_norms
from search_spaces import load_space


def randomise_norms(model: nn.Module) -> None:
    """Statistics and weights as a training leaves them; fresh ones would fold into next to nothing."""
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.data.normal_(0, 0.3, generator=rng)  # type: ignore[union-attr]
            for tensor in (module.running_var, module.weight):
                tensor.data.uniform_(0.5, 1.5, generator=rng)  # type: ignore[union-attr]


def networks() -> list[tuple[str, nn.Module]]:
    return [
        ("convfirst", load_space("small").anchor().build(10)),
        ("mobilenetv4", timm.create_model("mobilenetv4_conv_small", num_classes=10)),
        ("efficientnet", timm.create_model("efficientnet_lite0", num_classes=10)),
    ]


@pytest.mark.parametrize(("name", "model"), networks(), ids=[name for name, _ in networks()])
def test_folding_keeps_the_function_and_leaves_no_norm(name: str, model: nn.Module) -> None:
    randomise_norms(model)
    model = model.double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(images)
        folded = fold_batch_norms(model)
        # In float64 both are exact but for rounding, so a bias or an activation left out would show.
        torch.testing.assert_close(folded(images), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_norm_before_its_convolution_is_left_alone() -> None:
    """Registered after a convolution of the same width, as in pre-activation networks, but applied to its input."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(4, 4, 1)
            self.norm2 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv2(self.norm2(self.conv1(x).relu()))

    model = PreActivation()
    randomise_norms(model)
    model.eval()
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(fold_batch_norms(model)(x), model(x), rtol=0, atol=0)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.training=True"):
        fold_batch_norms(load_space("small").anchor().build(10))
