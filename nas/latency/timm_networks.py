"""Networks of timm, which are measured besides ConvFirst networks."""

from __future__ import annotations

import difflib

from torch import nn

from nas.errors import UsageError


def timm_engine(engine: str) -> str:
    """The engine that times timm models beside a study's networks: the study's, but `fused` knows ConvFirst only."""
    return "inductor" if engine == "fused" else engine


def require_timm_model(name: str, flag: str) -> None:
    """Check that timm has a model of that name.

    Raises:
        UsageError: timm has no such model, or no such weights of it.
    """
    import timm
    from timm.models import split_model_name_tag

    model, tag = split_model_name_tag(name)
    if timm.is_model(model) and tag and name not in timm.list_pretrained(f"{model}.*"):
        known = ", ".join(each.partition(".")[2] for each in timm.list_pretrained(f"{model}.*")) or "none"
        raise UsageError(f"{flag} {name}: timm has no such weights of {model} (there: {known})")
    if not timm.is_model(model):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UsageError(f"{flag} {name}: timm has no such model{hint}")


def timm_model(name: str, classes: int) -> nn.Module:
    """A timm model with random weights, in evaluation mode."""
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return model.eval()


def timm_resolution(name: str) -> int:
    """Width and height in pixels of the images that a timm model was made for."""
    import timm

    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config is not None else 224
