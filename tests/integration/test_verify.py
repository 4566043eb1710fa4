"""`halve verify` accepts an intact output, and finds any change to any file."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import RECORD, is_finished, read_record, sha256
from halve.cli import main
from halve.errors import CheckpointError, HalveError, OutputError, RecordError
from halve.records import RECORD_FORMAT, PackRecord, PruneRecord, parse_record
from halve.records.checksum import CHECKSUM, to_json_with_checksum
from tests.tables import files_of_at_most

# Row -> how the output is made from a bfloat16 model: options of prune, then commands.
RECIPES: dict[str, tuple[dict, tuple]] = {
    "half": ({}, ()),
    "half, in one file": ({}, ()),
    "2:4": ({"sparsity": "2:4"}, ()),
    "packed at once": ({"packed": True}, ()),
    "packed": ({"sparsity": "2:4"}, (halve.pack,)),
    "unpacked": ({"sparsity": "2:4"}, (halve.pack, halve.unpack)),
    "int4": ({"quantize": "int4", "group_size": 32}, ()),
    "int4, packed": ({"quantize": "int4", "group_size": 32}, (halve.pack,)),
}
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def intact(pico, text, tmp_path_factory):
    """Return a function that returns a row's output; tests must not write to it."""
    found: dict[str, Path] = {}

    def folder(row: str, family: str = "llama") -> Path:
        if (key := f"{row}-{family}") not in found:
            options, commands = RECIPES[row]
            base = tmp_path_factory.mktemp("intact")
            model, out = pico(family, dtype=torch.bfloat16), base / "out-0"
            solver = "sparsegpt" if "quantize" in options else "magnitude"
            options = {"samples": 4, "seq_len": 32, "calibration": str(text)} | options
            with files_of_at_most(10**9 if row.endswith("in one file") else 0):
                halve.prune(model, out, solver=solver, device="cpu", **options)
                for count, command in enumerate(commands, start=1):
                    command(out, base / f"out-{count}")
                    out = base / f"out-{count}"
            found[key] = out
        return found[key]

    return folder


@pytest.fixture
def copied(intact, tmp_path):
    """Return a function that copies a row's output, for a test to damage."""

    def copy(row: str) -> Path:
        return Path(shutil.copytree(intact(row), tmp_path / "out"))

    return copy


def found(folder: Path) -> str:
    """Return the findings or the error of verify, as text; empty if there are none."""
    try:
        return "; ".join(str(finding) for finding in halve.verify(folder).findings)
    except HalveError as error:
        return str(error)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("row", RECIPES)
def test_an_intact_output_passes(row, family, intact):
    folder = intact(row, family)
    verified = halve.verify(folder)
    assert verified.findings == ()
    assert verified.sound
    assert verified.files == len([*folder.iterdir()]) - 1
    assert verified.matrices == len(halve.inspect(folder).matrices)


@pytest.mark.parametrize("row", ["2:4", "packed at once", "packed", "unpacked"])
def test_a_flipped_bit_is_found_in_every_file(row, copied):
    folder = copied(row)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for place in {0, len(good) // 3, len(good) // 2, len(good) - 1}:
            for bit in (0, 6):
                bad = bytearray(good)
                bad[place] ^= 1 << bit
                path.write_bytes(bad)
                assert path.name in found(folder), (path.name, place, bit)
        path.write_bytes(good)
    assert not found(folder)


def test_a_flipped_bit_is_found_at_every_place_of_the_record(copied):
    folder = copied("2:4")
    path = folder / RECORD
    good = path.read_bytes()
    for place in [*range(0, len(good), 11), *range(len(good) - 90, len(good))]:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        assert RECORD in found(folder), place


CUTS = {
    "the last byte": lambda data: data[:-1],
    "the first byte": lambda data: data[1:],
    "all": lambda data: b"",
    "none, and a byte is added": lambda data: data + b" ",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("row", ["half", "packed"])
def test_an_added_or_removed_byte_is_found_in_every_file(row, cut, copied):
    folder = copied(row)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.write_bytes(CUTS[cut](good))
        assert path.name in found(folder)
        path.write_bytes(good)


@pytest.mark.parametrize("row", ["half", "packed"])
def test_a_missing_file_is_found(row, copied):
    folder = copied(row)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        path.unlink()
        assert path.name in found(folder)
        path.write_bytes(good)


@pytest.mark.parametrize("row", ["half", "packed"])
def test_swapped_shards_are_found(row, copied):
    folder = copied(row)
    *_, first, second = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)
    findings = {finding.name for finding in halve.verify(folder).findings}
    assert findings == {first.name, second.name}


def record_again(folder: Path) -> None:
    """Rewrite the record with the current SHA-256 of every file."""
    path = folder / RECORD
    record = parse_record(path.read_text())
    shards = {name: sha256(folder / name) for name in record.shards}
    files = {name: sha256(folder / name) for name in record.files}
    path.write_text(replace(record, shards=shards, files=files).to_json())


def change(folder: Path, edit) -> None:
    """Edit the query matrix, and update the SHA-256 of its file in the record."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][QUERY]
    tensors = load_file(shard)
    tensors[QUERY] = edit(tensors[QUERY].clone())
    save_file(tensors, shard, {"format": "pt"})
    record_again(folder)


def fill_a_zero(weight):
    weight[tuple((weight == 0).nonzero()[0])] = 0.5
    return weight


def lose_a_weight(weight):
    weight.view(-1)[weight.view(-1).nonzero()[0]] = 0
    return weight


def shift_by_one(weight):
    """Keep the number of zeros, but violate the pattern."""
    return weight.roll(1, dims=1)


def leave_the_grid(weight):
    weight.view(-1)[weight.view(-1).nonzero()[0]] *= 1.01
    return weight


def lose_codes(codes):
    """Turn the first 16 codes of 4 bits into that of zero; no code leaves the grid."""
    codes.view(-1)[:8] = 0x88
    return codes


BROKEN = {
    "half": (fill_a_zero, "are zero, not"),
    "2:4": (shift_by_one, "keep more than 2"),
    "unpacked": (shift_by_one, "keep more than 2"),
    "packed": (lose_a_weight, "are zero, not"),
    "packed at once": (lose_a_weight, "are zero, not"),
    "int4": (leave_the_grid, "1 of 128 groups of weights do not lie on an int4 grid"),
    "int4, packed": (lose_codes, "are zero, not"),
}


@pytest.mark.parametrize("row", BROKEN)
def test_a_matrix_that_is_not_as_recorded_is_found_whatever_the_checksums_say(
    row, copied
):
    edit, message = BROKEN[row]
    folder = copied(row)
    record_again(folder)
    assert not found(folder)
    change(folder, edit)
    (finding,) = halve.verify(folder).findings
    assert finding.name == QUERY
    assert message in finding.problem


def test_weights_that_would_be_loaded_instead_are_found(copied):
    folder = copied("half")
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert "model.safetensors" in found(folder)


def test_a_file_that_is_never_loaded_is_ignored(copied):
    folder = copied("half")
    (folder / "notes.md").write_text("Some notes.")
    assert halve.verify(folder).sound


def test_a_folder_without_a_record_is_refused(pico):
    with pytest.raises(CheckpointError, match=r"no halve.json .* Pass a folder"):
        halve.verify(pico("llama"))


def _with_format(folder: Path, version: object) -> None:
    """Give a record another format, and a checksum that matches."""
    path = folder / RECORD
    fields = json.loads(path.read_text()) | {"format": version}
    del fields[CHECKSUM]
    path.write_text(to_json_with_checksum(fields))


READERS = {
    "verify": lambda folder, out: halve.verify(folder),
    "pack, which embeds it": halve.pack,
    "unpack, which embeds it": halve.unpack,
    "prune, which finds its own output": lambda folder, out: read_record(
        folder, PruneRecord.from_json
    ),
    "pack, which finds its own output": lambda folder, out: read_record(
        folder, PackRecord.from_json
    ),
    "a run with the same output": lambda folder, out: is_finished(folder, {}),
}


@pytest.mark.parametrize("version", [1, RECORD_FORMAT + 1, 99])
@pytest.mark.parametrize("reader", READERS)
def test_a_record_of_another_format_is_refused_by_name(
    reader, version, copied, tmp_path
):
    folder = copied("packed" if "unpack" in reader else "half")
    _with_format(folder, version)
    with pytest.raises(RecordError) as refusal:
        READERS[reader](folder, tmp_path / "rewritten")
    message = str(refusal.value)
    assert str(folder / RECORD) in message
    assert f"has format {version}," in message
    assert f"reads format {RECORD_FORMAT}." in message
    assert not any(path.name.startswith("rewritten") for path in tmp_path.iterdir())


def test_the_format_is_compared_by_the_records_themselves(copied):
    for row, kind in {"half": PruneRecord, "packed": PackRecord}.items():
        folder = copied(row)
        kind.from_json((folder / RECORD).read_text())
        _with_format(folder, 99)
        with pytest.raises(RecordError, match="has format 99"):
            kind.from_json((folder / RECORD).read_text())
        shutil.rmtree(folder)


@pytest.mark.parametrize("version", [None, "2", True, 2.0])
def test_a_format_that_is_no_integer_is_no_record(version, copied, tmp_path):
    folder = copied("half")
    _with_format(folder, version)
    with pytest.raises(CheckpointError, match=RECORD):
        halve.verify(folder)
    with pytest.raises(OutputError, match=RECORD):
        read_record(folder, PruneRecord.from_json)
    assert halve.pack(folder, tmp_path / "packed").source is None


HOSTILE = {
    "a path": {"files": {"../secret": "0"}},
    "a number for the files": {"files": 7},
    "an invalid pattern": {"blocks": [{"matrices": [{"pattern": "9:1"}]}]},
}


@pytest.mark.parametrize("row", HOSTILE)
def test_an_invalid_record_with_a_valid_checksum_is_refused(row, copied):
    folder = copied("half")
    record = parse_record((folder / RECORD).read_text())
    (folder / RECORD).write_text(_with(record, HOSTILE[row]).to_json())
    assert RECORD in found(folder)


def _with(record, changes):
    if "blocks" not in changes:
        return replace(record, **changes)
    block = record.blocks[0]
    matrix = replace(block.matrices[0], **changes["blocks"][0]["matrices"][0])
    return replace(record, blocks=(replace(block, matrices=(matrix,)),))


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["halve", "verify", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


def test_the_command_reports_findings_and_exits_with_one(copied, run):
    folder = copied("2:4")
    code, out, errors = run(folder)
    assert (code, errors) == (0, "")
    assert "14 matrices: sparsity, pattern and grid as recorded" in out
    config = folder / "config.json"
    config.write_text(config.read_text().replace("64", "65", 1))
    code, out, errors = run(folder)
    assert code == 1
    assert "config.json" in out
    assert errors.startswith("Error: config.json in ")
    code, out, _ = run(folder, "--json")
    assert code == 1
    assert json.loads(out)["sound"] is False
    assert json.loads(out)["findings"][0]["name"] == "config.json"
