from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from kernels.lab import benchmark
from kernels.peers import cudnn_search, inductor_options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_inductor_tunes_all_it_can_and_leaves_graphs_to_the_meter() -> None:
    options = inductor_options(CUDA)
    assert options["max_autotune"]
    assert options["freezing"]
    assert not options.get("triton.cudagraphs")
    assert "freezing" not in inductor_options(CUDA, freezing=False)
    # The real one refuses what it does not know.
    torch.compile(nn.ReLU(), options=options)
    with pytest.raises(RuntimeError, match="max_autotone"):
        torch.compile(nn.ReLU(), options={**options, "max_autotone": True})
    assert inductor_options(CPU) == {}


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_benchmark_compiles_with_them(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    module = nn.ReLU()
    assert benchmark._compiled(module, device).forward is module
    assert asked == [{"fullgraph": True, "dynamic": False, "options": inductor_options(device) or None}]


def test_cudnn_searches_within_the_context_only() -> None:
    assert not torch.backends.cudnn.benchmark
    with cudnn_search(CPU):
        assert not torch.backends.cudnn.benchmark
    with suppress(KeyError), cudnn_search(CUDA):
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.backends.cudnn.benchmark


@pytest.mark.gpu
def test_what_cudnn_found_is_kept_for_a_capture() -> None:
    """Within a capture nothing can be timed: a search there would be an error."""
    conv = nn.Conv2d(24, 40, 3, bias=False).cuda()
    x = torch.randn(2, 24, 19, 17, device="cuda")
    with torch.inference_mode():
        with cudnn_search(CUDA):
            expected = conv(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = conv(x)
        graph.replay()
    torch.testing.assert_close(output, expected)
