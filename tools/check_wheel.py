"""Check what is in a wheel, or that an installed one runs with its kernels.

    python tools/check_wheel.py dist/*.whl
    python tools/check_wheel.py --installed

Run from the repository. A wheel must hold every file of src/halve and the kernels'
library, and nothing else; its tag must be that of a platform and of any Python. Of an
installed one the library must load, with the ABI that the Python code expects.
"""

import argparse
import sys
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("halve/libhalve_kernels.so", "halve/libhalve_kernels.dylib")
# What the compiler and the interpreter leave beside sources.
LEFT = ("__pycache__", "libhalve_kernels.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL")
    parser.add_argument("--installed", action="store_true", help="check what runs")
    options = parser.parse_args()
    if not options.wheels and not options.installed:
        parser.error("name a wheel, or --installed")
    for wheel in options.wheels:
        stop_on(faults(wheel), wheel.name)
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, complete")
    if options.installed:
        stop_on(installed_faults(), "halve")
        print(f"halve {metadata.version('halve')}: its kernels run")


def stop_on(found: list[str], name: str) -> None:
    if found:
        sys.exit("\n".join(f"{name}: {fault}" for fault in found))


def faults(wheel: Path) -> list[str]:
    """Return what is wrong with the contents of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    present = {name for name in names if ".dist-info/" not in name}
    libraries = present & set(LIBRARIES)
    found = [f"{name} is missing" for name in sorted(sources() - present)]
    found += [
        f"{name} does not belong there"
        for name in sorted(present - sources() - libraries)
    ]
    if len(libraries) != 1:
        found.append("the kernels' library is missing")
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        found.append("the licence is missing")
    python, abi, platform = wheel.stem.split("-")[-3:]
    if (python, abi) != ("py3", "none") or platform == "any":
        found.append(f"its tag is {python}-{abi}-{platform}")
    return found


def sources() -> set[str]:
    """Return the files of the package in this repository."""
    folder = ROOT / "src"
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {
        path
        for path in paths
        if path.startswith("halve/") and not any(part in path for part in LEFT)
    }


def installed_faults() -> list[str]:
    """Return what is wrong with the kernels of the installed package."""
    from halve.runtime.cpu.kernels import kernels  # noqa: PLC0415 (a wheel needs none)

    loaded = kernels()
    return [] if loaded is not None else ["it runs without its kernels"]


if __name__ == "__main__":
    main()
