"""Developers' commands on the search: samplers, noise, overhead, kernel sweeps. They are not installed.

They import `nas`, `kernels` and `kernels.lab`; only tests import them.
"""
