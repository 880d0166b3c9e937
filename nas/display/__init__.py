"""Figures, notes and files of a study that a running search draws, too.

It may import nas.latency, the modules of nas itself and the lower packages; nas.search and all above import it.
"""
