"""Work on a finished study: measuring it again, training its networks for longer, comparing them with known ones.

It may import nas.search, nas.display, nas.latency, nas.training and what these may; nas.report and nas.cli import it.
"""
