"""Export of networks: directories, their templates, formats to deploy, and the timing of these side by side.

This room imports from display, latency, training and the modules of nas/ itself; only cli and final_training import it.
"""
