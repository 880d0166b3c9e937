"""An architecture as one Python file that needs timm alone: it registers the network, and runs timm's scripts on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search_spaces.arch import ArchSpec
from search_spaces.timm_config import model_args

_HEADER = '''\
"""{name}, a ConvFirst network: {arch}

Needs timm alone. Importing this file registers the network:

    import timm, {name}
    model = timm.create_model("{name}", pretrained=False)

As a program it registers the network and then runs one of timm's own scripts, which cannot import it themselves:

    python {name}.py path/to/train.py --config train.yaml --data-dir path/to/images
"""

import os
import runpy
import sys
'''

_NETWORK = '''

NAME = "{name}"
MODEL_ARGS = {model_args}
PRETRAINED_CFG = {pretrained_cfg}
# Beside this file, if the network was trained.
WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "model.safetensors")
if os.path.exists(WEIGHTS):
    PRETRAINED_CFG["file"] = WEIGHTS
default_cfgs.update(generate_default_cfgs({{NAME: PRETRAINED_CFG}}))


@register_model
def {name}(**kwargs: Any) -> nn.Module:
    """{arch}"""
    return build(NAME, **(MODEL_ARGS | kwargs))


if __name__ == "__main__":
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit(f"usage: python {{sys.argv[0]}} path/to/train.py [its options]: one of timm's scripts")
    # As if it had been called itself.
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
'''


def timm_file(name: str, arch: ArchSpec, config: dict[str, Any]) -> str:
    """The text of a Python file that registers an architecture with timm under a name of its own.

    Args:
        name: a Python identifier.
        config: fields as `timm_config` gives them.
    """
    shared = Path(__file__).with_name("timm_models.py").read_text(encoding="utf-8")
    # Imports may follow other imports, but a docstring may not.
    shared = shared.split('"""', 2)[2].replace("from __future__ import annotations\n\n", "").lstrip("\n")
    network = _NETWORK.format(
        name=name, arch=arch, model_args=_literal(model_args(arch)),
        pretrained_cfg=_literal(_with_tuples(config["pretrained_cfg"])),
    )  # fmt: skip
    return _HEADER.format(name=name, arch=arch) + shared + network


def _literal(value: dict[str, Any]) -> str:
    lines = [f"    {key!r}: {entry!r}," for key, entry in value.items()]
    return "{\n" + "\n".join(lines) + "\n}"


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with tuples instead of lists, like timm's own: its benchmark.py adds a tuple to the input's size."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
