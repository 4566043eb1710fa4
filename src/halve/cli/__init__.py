"""The command line: parse options, call the library, print. Nothing else prints."""

from halve.cli.app import main

__all__ = ["main"]
