"""How a process of torchrun ends: with its exit code, and without a teardown."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from halve.cli.rank_exit import exit_without_teardown
atexit.register(lambda: print("teardown"))
with exit_without_teardown():
    print("done")
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(143)", 143)],
)
@pytest.mark.parametrize("torchrun", [True, False])
def test_the_exit_code_is_kept_and_only_a_rank_skips_the_teardown(end, code, torchrun):
    environment = {k: v for k, v in os.environ.items() if "TORCHELASTIC" not in k}
    if torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "run"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)],
        capture_output=True,
        check=False,
        env=environment,
        text=True,
    )
    assert ended.returncode == code
    assert ended.stdout.split() == ["done"] + ["teardown"] * (not torchrun)


def test_an_error_is_not_swallowed():
    """A traceback is printed, and the exit code is that of an error."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end="raise ValueError('defect')")],
        capture_output=True,
        check=False,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "run"},
        text=True,
    )
    assert ended.returncode == 1
    assert "defect" in ended.stderr
