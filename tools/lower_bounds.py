"""Test Halve with the oldest releases that pyproject.toml allows.

    python3.11 tools/lower_bounds.py [--venv FOLDER] [--except torch ...] [--all]

Reads `requires-python` and `[project] dependencies`, creates a virtual environment in
which every dependency has exactly its lower bound, installs Halve into it and runs a
part of the test suite (or all of it, with --all). It must be run by the oldest Python
that `requires-python` allows. Indirect dependencies are the newest that fit. The script
fails if the bounds contradict each other, if pip installs another release, and if a
test fails. Then a bound is wrong: raise it to the lowest release that passes.

Packages come from the indexes that pip is configured to use. A CPU build of torch (such
as 2.7.0+cpu) satisfies a bound as well as the CUDA build, and is much smaller.
`--except NAME` does not pin a package whose oldest release is not available. An
environment that exists already with the same bounds is reused.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
# Tests that use every dependency: contracts, model families, packing, command line.
TESTS = (
    "tests/contracts",
    "tests/integration/test_families.py",
    "tests/integration/test_packing.py",
    "tests/integration/test_packing_stopped.py",
    "tests/integration/test_pack_commands.py",
    "tests/integration/test_command_line.py",
)
BOUND = re.compile(r"^([\w.-]+)\s*(?:\[[^]]*\])?[^;]*?>=\s*([\w.]+)")


def main() -> None:
    options = parse_arguments()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    check_python(project["requires-python"])
    bounds = lower_bounds(project["dependencies"], options.left_free)
    python = install(options.venv, bounds)
    check_installed(python, bounds)
    sys.exit(run_tests(python, ["tests"] if options.all else list(TESTS)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / ".venv-lower-bounds"
    parser.add_argument("--venv", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--all", action="store_true", help="run the whole test suite")
    parser.add_argument(
        "--except",
        dest="left_free",
        action="append",
        default=[],
        metavar="NAME",
        help="do not pin this dependency",
    )
    return parser.parse_args()


def check_python(requirement: str) -> None:
    oldest = requirement.removeprefix(">=").strip()
    running = "{}.{}".format(*sys.version_info)
    if running != oldest:
        sys.exit(f"This is Python {running}. Run the script with Python {oldest}.")


def lower_bounds(dependencies: list[str], left_free: list[str]) -> dict[str, str]:
    """Return package -> oldest allowed release; every dependency must declare one."""
    bounds: dict[str, str] = {}
    for dependency in dependencies:
        match = BOUND.match(dependency)
        if match is None:
            sys.exit(f"{dependency!r} has no lower bound. Declare one by >=.")
        bounds[match[1]] = match[2]
    return {name: bound for name, bound in bounds.items() if name not in left_free}


def install(venv: Path, bounds: dict[str, str]) -> Path:
    """Create the environment; return its interpreter."""
    python, pins = venv.absolute() / "bin/python", venv / "lower-bounds.txt"
    lines = "".join(f"{name}=={bound}\n" for name, bound in bounds.items())
    if not (pins.exists() and pins.read_text("utf-8") == lines):
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pins.write_text(lines, "utf-8")
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", pins]
    try:
        subprocess.run([*pip, *TOOLS, *bounds], check=True)
        # Halve is reinstalled each time: its sources change, its version does not.
        again = ["--force-reinstall", "--no-deps"]
        subprocess.run([*pip, ROOT], check=True)
        subprocess.run([*pip, *again, ROOT], check=True)
    except subprocess.CalledProcessError:
        pins.unlink()
        sys.exit("The lower bounds cannot be installed together; see pip's message.")
    return python


def check_installed(python: Path, bounds: dict[str, str]) -> None:
    """Print what is installed; stop where a package is not at its lower bound."""
    command = [python, "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    installed = {normal(entry["name"]): entry["version"] for entry in listed}
    for name, bound in bounds.items():
        version = installed[normal(name)]
        print(f"{name} {version}", flush=True)
        if trimmed(version) != trimmed(bound):
            sys.exit(f"{name} {version} is installed, but {bound} was requested.")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def trimmed(version: str) -> list[str]:
    """Return a release's numbers without zeros at its end and build (2.6.0+cpu)."""
    return re.sub(r"(\.0)+$", "", version.partition("+")[0]).split(".")


def run_tests(python: Path, tests: list[str]) -> int:
    command = [python, "-m", "pytest", "-m", "not slow", "-n", "auto", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    main()
