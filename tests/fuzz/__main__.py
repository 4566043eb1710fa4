"""Coverage-guided fuzzing of one parser: `python -m tests.fuzz NAME --seconds 600`.

Needs atheris, which `make test` does not: pip install atheris. Inputs that reach new
lines are stored in build/fuzz/NAME. One that crashes, hangs or exceeds its memory is
written to build/fuzz/NAME-crash-*, and the exit code is not 0. To reproduce it:
`python -m tests.fuzz NAME --replay FILE`. Then add it as a row to
tests/hostile/test_found.py.
"""

import argparse
import contextlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import transformers

from halve.errors import HalveError
from tests.fuzz.targets import TARGETS, Target

try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    sys.exit("Fuzzing needs atheris: pip install atheris")


_FOLDER = Path("build/fuzz")
# Memory of the process, torch included; time and length of one input.
_MAX_MEGABYTES, _MAX_SECONDS, _MAX_BYTES = 3000, 20, 65536


def functions() -> Iterator[FunctionType]:
    """Yield every imported function and method of Halve.

    Instrumenting imports would be simpler, but atheris does not see the import hook of
    an editable installation.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "halve":
            owned = [v for v in vars(module).values() if isinstance(v, type)]
            for owner in (module, *(v for v in owned if v.__module__ == name)):
                for value in vars(owner).values():
                    found = getattr(value, "__func__", getattr(value, "fget", value))
                    found = inspect.unwrap(found) if callable(found) else found
                    if isinstance(found, FunctionType):
                        yield found


def instrument() -> int:
    """Instrument all functions of Halve for coverage; return their number."""
    instrumented = {f for f in functions() if f.__module__.partition(".")[0] == "halve"}
    for function in instrumented:
        atheris.instrument_func(function)
    return len(instrumented)


def corpus(name: str, target: Target) -> Path:
    """Write the seeds to the folder that the fuzzer reads; return it."""
    folder = _FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    return folder


def dictionary(name: str, target: Target) -> Path:
    """Write the tokens of a file format as a libFuzzer dictionary; return its path."""
    octets = ("".join(f"\\x{o:02x}" for o in token.encode()) for token in target.tokens)
    path = _FOLDER / f"{name}.dict"
    path.write_text("".join(f'"{token}"\n' for token in octets))
    return path


def attempt(target: Target, data: bytes) -> None:
    """Parse an input; raise any error that is not a HalveError."""
    with contextlib.suppress(HalveError):
        target.attempt(data)


def main() -> None:
    """Fuzz a parser, or replay one input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--replay", type=Path)
    options = parser.parse_args()
    target = TARGETS[options.name]
    if options.replay:
        attempt(target, options.replay.read_bytes())
        return
    transformers.logging.set_verbosity_error()
    print(f"{instrument()} functions are instrumented")
    inputs = corpus(options.name, target)
    flags: dict[str, object] = {
        "max_total_time": options.seconds,
        "timeout": _MAX_SECONDS,
        "rss_limit_mb": _MAX_MEGABYTES,
        "max_len": _MAX_BYTES,
        "artifact_prefix": f"{_FOLDER}/{options.name}-",
        "print_final_stats": 1,
    }
    if target.tokens:
        flags["dict"] = dictionary(options.name, target)
    arguments = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *arguments, str(inputs)], lambda d: attempt(target, d))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
