"""The benchmark on a real model, in its smallest form, on the bundled one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tables import BUNDLED

SCRIPT = Path(__file__).parents[2] / "benchmarks/real_model.py"


@pytest.mark.slow
def test_rows_are_judged_in_two_domains_and_not_computed_twice(tmp_path):
    size = ["--samples", "4", "--seq-len", "64", "--segments", "3"]
    rows = ["--patterns", "50%", "--solvers", "sparsegpt", "magnitude"]
    command = [sys.executable, SCRIPT, "--model", BUNDLED, "--work", tmp_path]
    first = subprocess.run(
        [*command, *size, *rows], capture_output=True, text=True, check=True
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["solver"] for row in found.values()] == ["sparsegpt", "magnitude"]
    for row in found.values():
        for domain in ("in domain", "out of domain"):
            assert row[domain]["kl"] > 0
            assert row[domain]["perplexity"] > row["dense"][domain]["perplexity"]
    second = subprocess.run(
        [*command, *size, *rows], capture_output=True, text=True, check=True
    )
    assert second.stdout == first.stdout
    assert "magnitude at 50%" in first.stderr
    assert "magnitude at 50%" not in second.stderr


@pytest.mark.slow
def test_models_are_kept_where_that_is_asked(tmp_path):
    size = ["--samples", "4", "--seq-len", "64", "--segments", "3"]
    rows = ["--patterns", "50%", "--solvers", "magnitude"]
    command = [sys.executable, SCRIPT, "--model", BUNDLED, "--work", tmp_path]
    for keep, found in (([], 0), (["--keep"], 2), (["--keep"], 2)):
        done = subprocess.run(
            [*command, *size, *rows, *keep], capture_output=True, text=True, check=True
        )
        models = {file.parent for file in tmp_path.rglob("halve.json")}
        assert len(models) == found
    assert "magnitude at 50%" not in done.stderr  # both the row and the model are there
