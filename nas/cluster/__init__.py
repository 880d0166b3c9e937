"""A Ray cluster: the connection to it, its nodes, and calls that run there.

This room imports from latency, training and the modules of nas/ itself; search imports from it, where a cluster is
used. Ray is an extra: `connection` imports it when it is asked to, and hands it on. The functions of `tasks` run on the
nodes.
"""
