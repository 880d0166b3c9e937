"""What leaves the house: exported directories, their templates, deployable formats, and their timing side by side.

It imports from display, latency, training and the modules of nas/ itself; only cli imports it.
"""
