"""Predicted memory, disk and time of a run, and the limit set by `--memory`."""
