"""The command line: one module a command, and what they share.

A command reads its options, opens what it works on, calls one function of another room and prints what that returns.
It may import from every other room, and none imports from it. What needs torch is imported when a command runs, not
before: `--help` is quick.
"""
