"""Latencies of networks and of their parts on a device, and the device's limits.

This room imports from the modules of nas/ itself (`recorded` and those below it), kernels, search_spaces and studies.
"""
