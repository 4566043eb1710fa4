"""`python -m halve`, the same as `halve`."""

from halve.cli import main

if __name__ == "__main__":
    main()
