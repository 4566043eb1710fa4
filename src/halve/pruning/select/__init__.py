"""Candidates for a matrix, and the choice between them on held-out inputs."""
