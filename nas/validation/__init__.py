"""What is done to a finished study: measuring again, training for longer, and comparing with known networks.

It may import nas.search, nas.display, nas.latency, nas.training and what these may; nas.report and nas.cli import it.
"""
