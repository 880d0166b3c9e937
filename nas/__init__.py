"""The search: sample, build, time, train, store.

The rooms are `training` and `latency`, which judge one network; `display`, `cluster`, `search` and `validation`, which
fill a study and evaluate it; `export` and `report`, which present it; `final_training`, which trains a found network to
the end; and `cli`, the commands. A room may import from those named before it, from the modules here and from kernels,
search_spaces and studies; but `training` and `latency` do not import from each other, nor do `export` and `report`.
Only tests import from `lab`, the developers' commands.
"""
