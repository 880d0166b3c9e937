"""The command line: one module a command. It imports from every other room, and none imports from it."""
