"""`python -m halve`, the same as `halve`."""

from halve.cli import main
from halve.cli.rank_exit import exit_without_teardown

if __name__ == "__main__":
    with exit_without_teardown():
        main()
