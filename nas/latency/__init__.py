"""Latencies of networks and of their parts on a device, and what the device could do at best.

Imports the ground (`nas.config`, `nas.errors`, `nas.locks`, `nas.child_process`, `nas.reporting`) and the rooms below
it: kernels, search_spaces and studies.
"""
