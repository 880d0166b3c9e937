"""Developers' commands on the kernels: benchmarks, the compiler's output, an emulator. They are not installed.

They import `kernels`; only labs (`kernels.lab`, `nas.lab`) and tests import them.
"""
