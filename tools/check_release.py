"""Check that a tag is that of the version, and that a release is ready to be one.

    python tools/check_release.py v0.2.0

RELEASE.md says what else precedes a tag.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
URLS = ("Source", "Documentation", "Issues", "Changelog")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Name the tag, such as v0.2.0.")
    if found := faults(sys.argv[1]):
        sys.exit("\n".join(found))
    print(f"{sys.argv[1]} can be released.")


def faults(tag: str) -> list[str]:
    """Return what is missing from a release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    version, found = project["version"], []
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, and the version {version}.")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        found.append(f"{version} is the version of no release.")
    if f"\n## {version} " not in (ROOT / "CHANGELOG.md").read_text("utf-8"):
        found.append(f"CHANGELOG.md has no section {version}.")
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text("utf-8"):
        found.append(f"CITATION.cff does not say {version}.")
    missing = [name for name in URLS if name not in project.get("urls", {})]
    if missing:
        found.append(f"[project.urls] of pyproject.toml lacks {', '.join(missing)}.")
    return found


if __name__ == "__main__":
    main()
