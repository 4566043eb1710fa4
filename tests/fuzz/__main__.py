"""Coverage-guided fuzzing of one reader: `python -m tests.fuzz NAME --seconds 600`.

Needs atheris, which is no dependency of `make test`: pip install atheris. Inputs that
reach new lines are kept in build/fuzz/NAME; one that crashes, hangs or takes more than
its memory is written to build/fuzz/NAME-crash-*, and the exit code is not 0. To see one
again: `python -m tests.fuzz NAME --replay FILE`. Then make it a row of
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
# Of the process, with torch in it; and for one input.
_MEGABYTES, _SECONDS, _LONGEST = 3000, 20, 65536


def functions() -> Iterator[FunctionType]:
    """Yield every function and method of Halve that is imported.

    Imports are not instrumented instead, since an editable installation has a loader of
    its own, which atheris does not see.
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
    """Let atheris see which lines of Halve are reached; return how many functions."""
    ours = {f for f in functions() if f.__module__.partition(".")[0] == "halve"}
    for function in ours:
        atheris.instrument_func(function)
    return len(ours)


def corpus(name: str, target: Target) -> Path:
    """Write the seeds where the fuzzer looks for inputs."""
    folder = _FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    return folder


def dictionary(name: str, target: Target) -> Path:
    """Write the words of a reader's files as libFuzzer reads them."""
    octets = ("".join(f"\\x{o:02x}" for o in word.encode()) for word in target.words)
    path = _FOLDER / f"{name}.dict"
    path.write_text("".join(f'"{word}"\n' for word in octets))
    return path


def attempt(target: Target, data: bytes) -> None:
    """Read an input; whatever is no HalveError comes out of here."""
    with contextlib.suppress(HalveError):
        target.attempt(data)


def main() -> None:
    """Fuzz, or replay."""
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
    print(f"{instrument()} functions are watched")
    inputs = corpus(options.name, target)
    flags: dict[str, object] = {
        "max_total_time": options.seconds,
        "timeout": _SECONDS,
        "rss_limit_mb": _MEGABYTES,
        "max_len": _LONGEST,
        "artifact_prefix": f"{_FOLDER}/{options.name}-",
        "print_final_stats": 1,
    }
    if target.words:
        flags["dict"] = dictionary(options.name, target)
    words = [f"-{flag}={value}" for flag, value in flags.items()]
    atheris.Setup([sys.argv[0], *words, str(inputs)], lambda d: attempt(target, d))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
