"""Halve inside other libraries: transformers' loader, servers, inference engines."""
