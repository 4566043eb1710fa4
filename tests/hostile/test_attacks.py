"""What an attacker would put into a model's folder to harm whoever opens it.

Each row is an attack: its name, the model family, a function that changes a valid
model, and what the refusal must mention. Each must be refused within bounded memory and
time, in a separate process.
"""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import halve
from halve.checkpoint import Checkpoint
from halve.errors import CheckpointError
from halve.formats import split
from halve.formats.bitmask import pack
from halve.runtime.generation import check_whole
from tests.fuzz.judge import judge
from tests.hostile import spoilers as by

ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def renamed(name):
    return by.header(lambda h: h.update({name: h.pop(by.QUERY)}))


def in_place(file, make):
    """Replace a file by something that is not a regular file."""

    def spoil(folder):
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return spoil


def linked_out(file):
    """Move a file out of the folder and link to it."""

    def spoil(folder):
        target = folder.parent / "private"
        (folder / file).rename(target)
        (folder / file).symlink_to(target)

    return spoil


def padded(file, size):
    """Append blanks to a text file."""
    return lambda folder: (folder / file).write_bytes(
        (folder / file).read_bytes() + b" " * size
    )


def zeros(path):
    path.symlink_to("/dev/zero")


CHECKPOINTS = {
    "a header too large": (by.raw_header(b"{" + b" " * 2**24 + b"}"), ("header of",)),
    "a header full of tensors": (
        by.raw_header(json.dumps({f"{n}": ENTRY for n in range(300_000)}).encode()),
        ("header of",),
    ),
    "a tensor's name too long": (renamed("a" * 501), ("501 characters",)),
    "a tensor's name of a million characters": (
        renamed("a" * 10**6),
        ("1000000 characters",),
    ),
    "too many dimensions": (
        by.header(lambda h: h[by.QUERY].update(shape=[1] * 100_000 + [64, 64])),
        (by.QUERY, "which no weight has"),
    ),
    "a dimension of 2^63": (
        by.header(lambda h: h.update({"b": ENTRY | {"shape": [0, 2**63]}})),
        ("which no weight has",),
    ),
    "a named pipe": (in_place(by.WEIGHTS, os.mkfifo), ("no weights",)),
    "endless zeros": (in_place(by.WEIGHTS, zeros), ("no weights",)),
    "a link to itself": (
        in_place(by.WEIGHTS, lambda p: p.symlink_to(p)),
        ("no weights",),
    ),
    "an index that is a link out": (
        by.both(by.index(), linked_out(by.INDEX)),
        ("link",),
    ),
    "an index too large": (
        by.both(by.index(), padded(by.INDEX, 2**26)),
        (by.INDEX, "bytes"),
    ),
    "an index of empty lists": (
        by.index_text("[" + "[]," * 5_000_000 + "[]]"),
        (by.INDEX, "values"),
    ),
    "a pipe for a shard": (
        by.both(by.indexed_as("a"), lambda folder: os.mkfifo(folder / "a")),
        ("'a'", "not there"),
    ),
    "zeros for a shard": (
        by.both(by.indexed_as("a"), lambda folder: zeros(folder / "a")),
        ("'a'", "not there"),
    ),
    "a name of a million characters in the index": (
        by.index(lambda i: i["weight_map"].update({"a" * 10**6: by.SHARD})),
        ("which is not in it",),
    ),
}


def zipped(entries, before=b"", compress=zipfile.ZIP_STORED):
    """Replace the weights by an archive with these entries."""

    def spoil(folder):
        contents = io.BytesIO()
        with zipfile.ZipFile(contents, "w", compress) as archive:
            for name, data in entries:
                archive.writestr(name, data)
        by.data(by.BIN, before + contents.getvalue())(folder)

    return spoil


def calling(module, name, *arguments):
    """Return a pickle of a state dict, one of whose values is the result of a call."""
    call = f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R"
    return b"\x80\x02}X\x01\x00\x00\x00a" + call + b"s."


def archived(pickled):
    parts = [("archive/data.pkl", pickled), ("archive/version", b"3\n")]
    return zipped([*parts, ("archive/byteorder", b"little")])


def stretched(folder):
    """A tensor of a billion elements that are all the same stored one."""
    by.saved({by.QUERY: torch.zeros(1).expand(2**15, 2**15)})(folder)


def deflated(folder):
    """Compress an archive of torch: a quarter of a gigabyte of zeros."""
    torch.save({"a": torch.zeros(2**26)}, folder / "whole")
    with zipfile.ZipFile(folder / "whole") as whole:
        entries = [(name, whole.read(name)) for name in whole.namelist()]
    (folder / "whole").unlink()
    zipped(entries, compress=zipfile.ZIP_DEFLATED)(folder)


def legacy(change):
    """Save in the format that torch wrote before 1.6, with some bytes changed."""

    def spoil(folder):
        tensors = {"a": torch.zeros(1000)}
        (folder / by.WEIGHTS).unlink()
        path = folder / by.BIN
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
        path.write_bytes(change(path.read_bytes()))

    return spoil


THOUSAND, BILLIONS = b"M\xe8\x03", b"\x8a\x05" + (2**34).to_bytes(5, "little")
DATA = ("archive/data.pkl", b"\x80\x02}.")
DAMAGED = (by.BIN, "damaged")
PICKLES = {
    "compressed a thousandfold": (deflated, (*DAMAGED, "compressed")),
    "one element a billion times": (stretched, (*DAMAGED, "claim 4294967296 bytes")),
    "memory for a bytearray": (
        archived(calling("builtins", "bytearray", 2**33)),
        DAMAGED,
    ),
    "memory for a bytearray, by its old name": (
        archived(calling("__builtin__", "bytearray", 1)),
        DAMAGED,
    ),
    "memory for a tensor": (archived(calling("torch", "Tensor", 2**30)), DAMAGED),
    "a call of the system": (archived(calling("os", "system", "true")), DAMAGED),
    "a million empty lists": (archived(b"\x80\x02" + b"]" * 2_000_000 + b"."), DAMAGED),
    "a pickle too large": (archived(b"\x80\x02" + b"N0" * 2**22 + b"N."), DAMAGED),
    "duplicate entries": (zipped([DATA, DATA]), (*DAMAGED, "within an archive")),
    "behind other bytes": (zipped([DATA], b"PK\3\4"), (*DAMAGED, "within an archive")),
    "an empty archive": (zipped([]), DAMAGED),
    "legacy, and claims too much": (
        legacy(lambda data: data.replace(THOUSAND, BILLIONS, 1)),
        DAMAGED,
    ),
    "legacy, and truncated": (legacy(lambda data: data[:-2000]), DAMAGED),
    "legacy, and calls": (
        legacy(lambda data: data.replace(b"ccollections\nOrderedDict", b"cos\nsystem")),
        DAMAGED,
    ),
    "as torch wrote before 0.2": (by.data(by.BIN, b"storages" + bytes(4000)), DAMAGED),
}
NUMBERS = {  # entries of a config, by family
    "blocks": ("llama", {"num_hidden_layers": 10**9}),
    "blocks, by another name": ("gpt2", {"n_layer": 10**9}),
    "modules": ("llama", {"num_hidden_layers": 2**18, "layer_types": None}),
    "kinds of attention": ("llama", {"attention_types": [[["global"], 10**9]]}),
    "labels": ("llama", {"num_labels": 10**9}),
    "positions": ("gptj", {"n_positions": 2**31}),
    "positions whose square is too much": ("gpt2", {"n_positions": 10**5}),
    "positions of codegen": ("codegen", {"n_positions": 10**9}),
    "width": ("llama", {"hidden_size": 2**40}),
    "in a list": ("llama", {"a": [[{"b": [10**9]}]]}),
    "not a number": ("llama", {"rms_norm_eps": float("nan")}),
}
WITH_ENTRIES = {  # other entries of a config
    "other configs": (
        {"configuration_files": ["config.4.0.0.json"]},
        ("configuration_files", "does not follow"),
    ),
    "other weights": (
        {"transformers_weights": "other.safetensors"},
        ("transformers_weights", "does not follow"),
    ),
    "code for attention": (
        {"_attn_implementation": "someone/kernels"},
        ("code from the Hub", "someone/kernels"),
    ),
    "code for attention, by kind": (
        {"attn_implementation": {"text_config": "someone/kernels"}},
        ("code from the Hub",),
    ),
    "code for attention of a part": (
        {"text_config": {"attn_implementation": "someone/kernels:1"}},
        ("code from the Hub",),
    ),
    "a number for a method": ({"get_text_config": 7}, ("causal language model",)),
    "a text for a method": ({"to_dict": "a"}, ("causal language model",)),
    "no vocabulary": ({"vocab_size": None}, ("causal language model",)),
    "an architecture of a million characters": (
        {"architectures": ["a" * 10**6]},
        ("which is not",),
    ),
    "a method of a million characters": (
        {"quantization_config": {"quant_method": "a" * 10**6}},
        ("aa",),
    ),
}
CONFIGS = {
    "too large": (padded("config.json", 2**26), ("config.json", "bytes")),
    "full of lists": (
        by.text("config.json", '{"a": [' + "[]," * 5_000_000 + "[]]}"),
        ("config.json", "values"),
    ),
    "a pipe": (in_place("config.json", os.mkfifo), ("no config.json",)),
    "endless zeros": (in_place("config.json", zeros), ("no config.json",)),
    "a link out": (linked_out("config.json"), ("config.json", "link out")),
    "an adapter": (by.text("adapter_config.json", "{}"), ("adapter",)),
}


def changed(entries):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return spoil


ATTACKS = (
    {f"checkpoint: {row}": ("llama", *CHECKPOINTS[row]) for row in CHECKPOINTS}
    | {f"pickle: {row}": ("llama", *PICKLES[row]) for row in PICKLES}
    | {f"config: {row}": ("llama", *CONFIGS[row]) for row in CONFIGS}
    | {
        f"number: {row}": (NUMBERS[row][0], changed(NUMBERS[row][1]), ("config",))
        for row in NUMBERS
    }
    | {
        f"entry: {row}": ("llama", changed(WITH_ENTRIES[row][0]), WITH_ENTRIES[row][1])
        for row in WITH_ENTRIES
    }
)


def size(folder):
    files = (path for path in folder.iterdir() if path.is_file())
    return sum(path.lstat().st_size for path in files)


@pytest.fixture
def copied(pico, tmp_path):
    return lambda family: shutil.copytree(pico(family), tmp_path / "model")


@pytest.mark.parametrize("row", ATTACKS)
def test_attacks_are_refused_within_bounds(row, copied):
    family, spoil, mentions = ATTACKS[row]
    folder = copied(family)
    spoil(folder)
    verdict = judge(lambda: halve.inspect(folder), size(folder))
    assert verdict.outcome == "refused", verdict
    assert len(verdict.detail) < 1000
    for mention in mentions:
        assert mention in verdict.detail, (mention, verdict)


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2", "codegen"])
def test_valid_models_are_read_within_the_same_bounds(family, copied):
    """Otherwise the tests above would prove nothing."""
    folder = copied(family)
    assert judge(lambda: halve.inspect(folder), size(folder)).outcome == "read"


LAYOUT, MASK = f"{by.QUERY}_layout", f"{by.QUERY}_mask"


def packed_parts(rows=64, columns=64):
    return split(by.QUERY, pack(torch.eye(rows, columns, dtype=torch.bfloat16)))


def wide():
    """Return one row of 2^29 columns in 64 MiB, which would take 2 GiB when dense."""
    words = 2**23
    return packed_parts(1) | {
        MASK: torch.zeros(1, words, dtype=torch.int64).view(torch.uint64),
        LAYOUT: torch.tensor([1, 64 * words, 0]),
    }


PACKED = {
    "a layout of four million numbers": lambda: (
        packed_parts() | {LAYOUT: torch.arange(2**22) + 2**40}
    ),
    "one row of half a billion columns": wide,
}


@pytest.mark.parametrize("row", PACKED)
def test_packed_attacks_are_refused_within_bounds(row, tmp_path):
    save_file(PACKED[row](), tmp_path / by.WEIGHTS)

    def read():
        checkpoint = Checkpoint.open(tmp_path)
        return checkpoint.read(checkpoint.tensors).keys()

    verdict = judge(read, size(tmp_path), growth=1)
    assert verdict.outcome == "refused", verdict
    assert by.QUERY in verdict.detail


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_a_config_that_does_not_declare_packed_weights(
    command, refused, pico, tmp_path
):
    model = tmp_path / "model"
    halve.prune(pico("llama"), model, solver="magnitude", packed=True, device="cpu")
    check_whole(model, "cpu", trust_remote_code=False)
    by.config(quantization_config=None)(model)
    prompt = ("def",) if command == "generate" else ()
    refused(command, model, *prompt, mentions=("packed", "config.json"))


def test_links_to_private_files_are_not_copied(pico, tmp_path):
    """A link does not put its target into the output; the record is left out."""
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    (tmp_path / "private").write_text(json.dumps({"password": "12345"}))
    (model / "halve.json").symlink_to(tmp_path / "private")
    tensors = {name: t.relu() for name, t in load_file(model / by.WEIGHTS).items()}
    save_file(tensors, model / by.WEIGHTS)
    assert halve.pack(model, tmp_path / "out").source is None
    assert "password" not in (tmp_path / "out/halve.json").read_text()
    (model / "notes.json").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"notes\.json .* link out"):
        halve.pack(model, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


GENERATIONS = {
    "garbage": "garbage",
    "a list": "[]",
    "a number": "7",
    "nested too deep": "[" * 100_000,
    "a number for a method": '{"to_dict": 7}',
}


@pytest.mark.parametrize("row", GENERATIONS)
def test_invalid_generation_configs(row, copied):
    folder = copied("llama")
    (folder / "generation_config.json").write_text(GENERATIONS[row])
    assert judge(lambda: halve.generate(folder, "def"), size(folder)).is_good


EXTRAS = {
    "beams": {"num_beams": 10**6, "num_return_sequences": 10**6},
    "stop strings": {"stop_strings": ["a"]},
    "invalid tokens": {
        "eos_token_id": 10**30,
        "pad_token_id": -1,
        "bos_token_id": [[]],
    },
    "a static cache": {"cache_implementation": "static", "max_length": 10**9},
}


@pytest.mark.parametrize("row", EXTRAS)
def test_entries_of_a_generation_config_that_are_ignored(row, copied):
    folder = copied("llama")
    expected = halve.generate(folder, "def", max_new_tokens=4)
    (folder / "generation_config.json").write_text(json.dumps(EXTRAS[row]))

    def generate():
        return halve.generate(folder, "def", max_new_tokens=4)

    verdict = judge(generate, size(folder))
    assert (verdict.outcome, verdict.detail) == ("read", expected), verdict


def test_a_header_of_the_largest_size_is_read(tmp_path):
    """The limit of 16 MiB is inclusive."""
    header = json.dumps({"a": ENTRY}).encode()
    header += b" " * (2**24 - len(header))
    (tmp_path / by.WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]
    (tmp_path / by.WEIGHTS).write_bytes(struct.pack("<Q", 2**24 + 1) + header + b" ")
    with pytest.raises(CheckpointError, match="header"):
        Checkpoint.open(tmp_path)
