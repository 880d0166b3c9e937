"""The search: sample, build, time, train, store."""
