"""The search: the loop, the study that it fills, proposals, evaluation and progress.

It stands on display, latency, training and the ground; cli, report, export and validation stand on it.
"""
