"""A Ray cluster: the connection to it, its nodes, and calls that run there.

This room imports from display, latency, training and the modules of nas/ itself; search imports from it. Only its
modules `connection`, `pool` and `stations` import ray, which is an extra: nothing imports them that does not use a
cluster. The functions of `tasks` run on the nodes.
"""
