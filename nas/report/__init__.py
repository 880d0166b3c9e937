"""The report of a study as one HTML page with figures, and the dashboard.

It may import nas.validation, nas.search, nas.display and what these may; only nas.cli imports it.
"""
