"""What `halve pack`, `unpack` and `inspect` print of packed models."""

import json
import sys

import pytest
import torch

import halve
from halve.cli import main
from tests.integration.packed_models import CHANGED, change_matrix
from tests.interruptions import digests


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a command line and gives (output, errors)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["halve", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr()

    return run


def test_pack_prints_how_much_smaller_the_model_is(run, made, tmp_path):
    _, pruned, packed = made()
    out, errors = run("pack", pruned, "-o", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(packed)
    matrices = halve.inspect(packed).matrices
    dense = sum(m.rows * m.columns * 2 for m in matrices)
    percent = 100 * sum(m.bytes for m in matrices) / dense
    assert "14 of 14 matrices are packed" in out
    assert f"{percent:.2f}% of" in out
    assert "packing" in errors


def test_pack_names_what_stays_dense(run, made, tmp_path):
    _, pruned, _ = made()
    mixed = change_matrix(pruned, tmp_path / "mixed", torch.ones_like)
    out, errors = run("pack", mixed, "-o", tmp_path / "out", "--quiet")
    assert "13 of 14 matrices are packed" in out
    assert CHANGED in out
    assert errors == ""
    matrices = json.loads(run("inspect", tmp_path / "out", "--json")[0])["matrices"]
    stored = {matrix["tensor"]: matrix["storage"] for matrix in matrices}
    assert stored.pop(CHANGED) == "dense"
    assert set(stored.values()) == {"bitmask"}


def test_inspect_prints_whole_names(run, made):
    _, pruned, _ = made()
    block, _, name = CHANGED.partition(".mlp.")
    out = run("inspect", pruned, "--all")[0]
    assert block in out
    assert f"mlp.{name.removesuffix('.weight')} " in out


def test_pack_and_unpack_print_their_records_as_json(run, made, tmp_path):
    _, pruned, packed = made()
    words = (("pack", pruned), ("unpack", packed))
    for number, (verb, folder) in enumerate(words):
        target = tmp_path / str(number)
        out, errors = run(verb, folder, "-o", target, "--json", "--quiet")
        assert errors == ""
        assert json.loads(out) == json.loads((target / "halve.json").read_text())
        assert json.loads(out)["kind"] == verb


def test_unpack_prints_what_it_did(run, made, tmp_path):
    _, pruned, packed = made()
    out, errors = run("unpack", packed, "-o", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(pruned)
    assert "14 matrices are dense" in out
    assert "unpacking" in errors


def test_inspect_distinguishes_packed_from_dense(run, made):
    _, pruned, packed = made()
    matrices = json.loads(run("inspect", packed, "--json")[0])["matrices"]
    assert all(matrix["packed"] for matrix in matrices)
    assert all(matrix["bytes"] == matrix["packed_bytes"] for matrix in matrices)
    assert run("inspect", packed, "--all")[0].count(" bitmask") == 14
    assert run("inspect", pruned, "--all")[0].count(" bitmask") == 0


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_help_ends_with_examples(verb, run):
    examples = run(verb, "--help")[0].partition("Examples")[2]
    assert f"halve {verb} ./" in examples
