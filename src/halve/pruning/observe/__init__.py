"""Calibration of one block: input groups, statistics, held-out and cached inputs."""
