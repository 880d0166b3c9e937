"""A first look at a GPU: `python -m nas.lab.first_look` runs a fused network in a CUDA graph, and says what it finds.

The anchor of a space is tuned, captured and compared with torch in float32; then its latency is measured, as in a
search. Any line of these tells more than a test that fails.
"""

from __future__ import annotations

import time

import torch
import typer

from kernels import diagnosis, fuse
from kernels.device_info import DeviceInfo
from kernels.device_state import read_state
from kernels.peers import cudnn_search
from nas.config import LatencyConfig
from nas.lab.options import Space
from nas.latency.meter import LatencyMeter
from search_spaces import load_space


def main(space: Space = "small") -> None:
    """Print the device, what is wrong with it, the anchor's fused modules, its error, and its latency."""
    if not torch.cuda.is_available():
        typer.echo(f"There is no CUDA device to look at: {diagnosis.why_no_cuda() or 'no GPU was found'}.", err=True)
        raise typer.Exit(1)
    device = torch.device("cuda", 0)
    typer.echo(f"{DeviceInfo.of(device)}; {read_state(device)}")
    for wrong in (diagnosis.no_compiler(), diagnosis.too_old(device), *diagnosis.disturbances(device)):
        if wrong is not None:
            typer.echo(wrong)
    loaded = load_space(space)
    anchor, size = loaded.anchor(), loaded.resolution[0]
    network = anchor.build(10).eval().to(device)
    x = torch.randn(1, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    begin = time.perf_counter()
    fused = fuse(network, torch.float16)
    with cudnn_search(device):
        graph = fused.graph(1, size)
    typer.echo(f"tuned and captured in {time.perf_counter() - begin:.1f} s")
    typer.echo(fused.report(1, size))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = network(x)
    error = (graph(x.half()).float() - expected).norm() / expected.norm()
    typer.echo(f"error of the logits, root mean square against float32: {float(error):.2g}")
    config = LatencyConfig(device="cuda", engine="fused", dtype="float16", resolution=size)
    meter = LatencyMeter(config, anchor.build(10))
    (measured,) = meter.measure_together([loaded.smallest().build(10)])
    typer.echo(f"anchor {meter.reference_ms:.4f} ms, smallest network {measured.latency.median_ms:.4f} ms")


if __name__ == "__main__":
    typer.run(main)
