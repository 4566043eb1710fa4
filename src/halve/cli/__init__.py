"""The command line: arguments in, one library call, words out. Only here is printed."""

from halve.cli.app import main

__all__ = ["main"]
