"""Data sets, the proxy training of one network, longer trainings side by side, and the weights that are kept.

It may import the modules of nas itself and the lower packages, but not nas.latency; all rooms above it import it.
"""
