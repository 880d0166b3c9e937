"""What keeps this machine's GPUs from being used or from being timed well, each in one line with what to do about it.

All is asked of NVML, torch and the environment before anything runs. Nothing here raises, allocates on a GPU, or takes
time that anyone would notice; where there is nothing of NVIDIA's, nothing is found.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import psutil
import torch

from kernels.device_state import handle_of, nvml, nvml_refusal, why_unreadable

# First driver of each of CUDA's generations, by NVIDIA's table of minor version compatibility (Linux).
FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
# Oldest compute capability that the kernels are compiled and checked for.
OLDEST_CAPABILITY = (8, 0)
# Share of the time, in percent, below which a desktop's drawing may keep a GPU busy.
BUSY_PERCENT = 5
# Some of CUDA's errors when it starts, and what mends them.
REMEDIES = {
    "802": "start the service nvidia-fabricmanager",
    "803": "restart the machine, as after each update of the driver",
    "804": "remove the package cuda-compat",
    "999": "reload the kernel module nvidia_uvm, or restart the machine",
}


def unused_gpu() -> str | None:
    """The reason why torch finds no CUDA device though this machine has a GPU, and what to do about it.

    None where torch finds one, where there is no GPU, and where CUDA_VISIBLE_DEVICES hides all of them on purpose.
    """
    return None if torch.cuda.is_available() or _hidden() else _without_cuda()


def why_no_cuda() -> str | None:
    """As `unused_gpu`, also where CUDA_VISIBLE_DEVICES hides all GPUs."""
    if torch.cuda.is_available():
        return None
    if _hidden():
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all GPUs"
    return _without_cuda()


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


@cache
def _without_cuda() -> str | None:
    library = nvml()
    if library is None:
        return None if (refusal := nvml_refusal()) is None else f"{refusal}; nvidia-smi should say more"
    try:
        count = library.nvmlDeviceGetCount()
        driver, number = library.nvmlSystemGetDriverVersion(), library.nvmlSystemGetCudaDriverVersion()
        names = {library.nvmlDeviceGetName(library.nvmlDeviceGetHandleByIndex(index)) for index in range(count)}
    except library.NVMLError as error:
        return f"NVML sees no GPU ({error}); nvidia-smi should say more"
    if not count:
        return None
    seen = f"NVML sees {count} x {', '.join(sorted(names))}" if count > 1 else f"NVML sees {names.pop()}"
    built = torch.version.cuda
    if built is None:
        return f"{seen}, and torch {torch.__version__} is built without CUDA; install a torch built for CUDA"
    known, needed = (number // 1000, number % 1000 // 10), int(built.partition(".")[0])
    if known[0] < needed:
        least = f"driver {FIRST_DRIVERS[needed]}" if needed in FIRST_DRIVERS else f"a driver for CUDA {needed}"
        return (
            f"{seen}, but its driver {driver} is too old: it is for CUDA {known[0]}.{known[1]} at most, and torch "
            f"{torch.__version__} is built for CUDA {built}; install {least} or later, or a torch built for CUDA "
            f"{known[0]}"
        )
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return f"{seen}, and CUDA_VISIBLE_DEVICES={visible} names none of what is there; unset or mend it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        found = re.search(r"Error (\d+): [^\n]*", str(error))
        said = found[0] if found else str(error).partition("\n")[0]
        remedy = REMEDIES.get(found[1] if found else "", "see the system's log")
        return f"{seen}, but CUDA does not start ({said}); {remedy}"
    return f"{seen}, and torch finds no CUDA device; see the system's log"


def no_compiler() -> str | None:
    """The reason why Triton cannot build the C code that launches its kernels; None where it can.

    The compiler is looked for as `triton.runtime.build` does: CC, which is one program's name or path, or else gcc or
    clang. The code includes Python.h.
    """
    try:
        from triton import knobs
    except ImportError:
        return "Triton is not installed; pip install triton"
    if knobs.build.impl is not None:
        return None
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC={named} is no program here, and Triton compiles with it; name a C compiler, or unset CC"
    if named is None and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler, and finds neither gcc nor clang; install one, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    folder = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (folder / "Python.h").is_file():
        return f"Triton needs Python's headers, and {folder} has no Python.h; install the package python3-dev"
    return None


def too_old(device: torch.device) -> str | None:
    """The reason why the fused kernels do not run on a CUDA device; None where they do."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    has, needs = (".".join(map(str, each)) for each in (capability, OLDEST_CAPABILITY))
    return f"needs a GPU of compute capability {needs} or later, and {torch.cuda.get_device_name(device)} has {has}"


def disturbances(device: torch.device) -> list[str]:
    """A line for each thing that makes latencies on a CUDA device less reliable: others that use it, and clocks that
    cannot be read. On a CPU there is none."""
    if device.type != "cuda":
        return []
    lines = []
    if others := _others(device):
        lines.append(
            f"{device}: others use it ({others}), which makes latencies longer and less certain; wait until they have "
            "ended, or take another --device"
        )
    if reason := why_unreadable(device):
        lines.append(
            f"{device}: its clocks cannot be read ({reason}), so throttling goes unnoticed; where that can be changed, "
            "let NVML read them (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
    return lines


def _others(device: torch.device) -> str | None:
    """The processes of others on a GPU and how busy it is, in words; None where nobody uses it or NVML refuses."""
    library = nvml()
    if library is None:
        return None
    try:
        handle = handle_of(device)
        busy = library.nvmlDeviceGetUtilizationRates(handle).gpu
        found = library.nvmlDeviceGetComputeRunningProcesses(handle)
    except (library.NVMLError, AttributeError):
        return None
    this = psutil.Process()
    own = {each.pid for each in (this, *this.parents(), *this.children(recursive=True))}
    others = [each for each in found if each.pid not in own]
    if not others and busy < BUSY_PERCENT:
        return None
    shown = [
        f"process {each.pid}" + ("" if each.usedGpuMemory is None else f" with {each.usedGpuMemory / 2**30:.1f} GiB")
        for each in others[:3]
    ]
    more = [f"{len(others) - 3} more"] if len(others) > 3 else []
    return ", ".join([*shown, *more, f"{busy} % busy"])
