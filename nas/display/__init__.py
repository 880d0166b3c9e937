"""Figures, notes, tables and files that show a study; a running search uses them as well as the commands.

It may import nas.latency, nas.training, the modules of nas itself and the lower packages; nas.search and all above
import it.
"""
