"""How many weights each part of a model loses, so that the whole loses just so many."""

from halve.allocation.apportion import apportion
from halve.allocation.sensitivity import share_out, spread

__all__ = ["apportion", "share_out", "spread"]
