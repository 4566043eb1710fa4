"""Where the work of a run lies until it is complete: beside its output, or in it.

Beside it, as `OUT.partial`, so that one rename completes the output. A folder that no
rename can replace is filled in place instead: a mounted volume, the current folder, or
one in a folder that is not writable. The work is then in `OUT/.halve.partial`, on the
disk of the output, and its files are moved up at the end.
"""

import os
import re
from pathlib import Path

_BESIDE, _WITHIN = ".partial", ".halve.partial"
# Of the file that is locked beside a work folder, on Windows.
LOCK_SUFFIX = ".lock"
# What `mkfs` leaves on a volume that holds nothing.
_OF_THE_DISK = frozenset({"lost+found"})


def partial_path(out: Path) -> Path:
    """Return the path of the folder in which an output is prepared."""
    # A run that was interrupted there is resumed there, from whatever folder.
    if is_being_filled(out) or (out.is_dir() and not _is_replaceable(out)):
        return out / _WITHIN
    return out.parent / f"{out.name}{_BESIDE}"


def is_being_filled(out: Path) -> bool:
    """Whether a run prepares, or prepared, an output within its folder."""
    return (out / _WITHIN).is_dir()


def foreign_names(out: Path) -> list[str]:
    """Return what an output folder holds that is neither a run's nor the disk's."""
    known = _OF_THE_DISK | {_WITHIN, f"{_WITHIN}{LOCK_SUFFIX}"}
    return sorted(path.name for path in out.iterdir() if path.name not in known)


def _is_replaceable(folder: Path) -> bool:
    """Whether a new folder can take the place of an existing, empty one."""
    return not (
        _is_mount_point(folder)
        or _is_current(folder)
        or not os.access(folder.parent, os.W_OK)
    )


def _is_current(folder: Path) -> bool:
    """Whether a folder is the current one: its shell would stay in the replaced one."""
    try:
        return folder.samefile(Path.cwd())
    except OSError:  # the current folder was removed
        return False


def _is_mount_point(folder: Path) -> bool:
    """Whether something is mounted on a folder.

    `os.path.ismount` compares devices, which are equal where a folder of the same disk
    is mounted ("bind").
    """
    return os.path.ismount(folder) or str(folder.resolve()) in _mount_points()


def _mount_points() -> set[str]:
    """Return the mount points of this process; none where /proc is not there."""
    try:
        table = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return set()
    # Its fifth field, in which spaces and the like are octal: `\040`.
    fields = [line.split(" ")[4] for line in table.splitlines()]
    return {re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), f) for f in fields}
