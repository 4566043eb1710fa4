"""One rule for the files beside the weights: fetched, copied, and seen by `verify`."""

import json
import os
import shutil

import pytest

import halve
from halve.checkpoint import find_side_files
from halve.checkpoint.side_files import select_side_files
from halve.checkpoint.source import files_to_download
from halve.errors import CheckpointError
from tests.interruptions import digests

# File of a repository -> whether transformers may read it beside the weights.
FILES = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer.model": True,
    "qwen.tiktoken": True,
    "source.spm": True,
    "bpe.codes": True,
    "vocab.txt": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "modeling_own.py": True,
    "layers/rotary.py": True,
    "LICENSE": True,
    "USE_POLICY.md": True,
    "original/LICENSE": True,
    "README.md": False,
    "figure.png": False,
    "halve.json": False,
    "measurements.json": False,
    ".gitattributes": False,
    ".cache/huggingface/download/config.json": False,
    "model.safetensors.index.json": False,
    "optimizer.pt": False,
    "checkpoint-500/config.json": False,
    "checkpoint-500/trainer_state.json": False,
    "checkpoint-500/nested/vocab.txt": False,
}


def test_the_rule():
    expected = sorted(name for name, wanted in FILES.items() if wanted)
    assert select_side_files(FILES) == expected


WEIGHTS = {
    "one file": (
        ["model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"],
        ["model.safetensors"],
    ),
    "both kinds": (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
    "shards": (
        [
            "model.safetensors.index.json",
            "a.safetensors",
            "b.safetensors",
            "consolidated-1.safetensors",
            "pytorch_model.bin",
        ],
        ["model.safetensors.index.json", "a.safetensors", "b.safetensors"],
    ),
    "pickles": (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
    "none that is read": (["consolidated.safetensors", "model.gguf"], []),
}


@pytest.mark.parametrize("row", WEIGHTS)
def test_no_second_copy_of_the_weights_is_downloaded(row, tmp_path):
    names, expected = WEIGHTS[row]

    def download(name):
        shards = {"x": "a.safetensors", "y": "b.safetensors"}
        (tmp_path / name).write_text(json.dumps({"weight_map": shards}))
        return tmp_path / name

    sides = select_side_files(FILES)
    everything = [*sides, "README.md", *names]
    assert files_to_download(everything, download) == [*sides, *expected]
    assert files_to_download(everything, download, weights=False) == sides


@pytest.fixture
def model(pico, tmp_path):
    """Return a copy of a model with files in subfolders."""
    folder = shutil.copytree(pico("llama"), tmp_path / "model")
    for name in ("additional_chat_templates/tool_use.jinja", "code/inner/a.py"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    (folder / "qwen.tiktoken").write_text("a 1")
    return folder


def test_every_verb_copies_what_is_in_subfolders(model, tmp_path):
    halve.prune(model, tmp_path / "half", solver="magnitude")
    halve.pack(tmp_path / "half", tmp_path / "packed")
    halve.unpack(tmp_path / "packed", tmp_path / "dense")
    for out in ("half", "packed", "dense"):
        assert find_side_files(tmp_path / out) == find_side_files(model)
        assert halve.verify(tmp_path / out).sound
        for name in find_side_files(model):
            if name != "config.json":
                copied = (tmp_path / out / name).read_bytes()
                assert copied == (model / name).read_bytes()
    template = "additional_chat_templates/tool_use.jinja"
    (tmp_path / "half" / template).write_text("other")
    assert [f.name for f in halve.verify(tmp_path / "half").findings] == [template]


def test_files_that_were_added_are_found(model, tmp_path):
    halve.prune(model, tmp_path / "half", solver="magnitude")
    (tmp_path / "half/README.md").write_text("A model.")
    assert halve.verify(tmp_path / "half").sound
    added = tmp_path / "half/additional_chat_templates/added.jinja"
    added.write_text("added")
    (finding,) = halve.verify(tmp_path / "half").findings
    assert finding.name == "additional_chat_templates/added.jinja"
    assert "does not list it" in finding.problem


def test_a_packing_that_gains_nothing_leaves_nothing(model, tmp_path):
    with pytest.raises(halve.HalveError, match="No matrix"):
        halve.pack(model, tmp_path / "packed")
    assert not list(tmp_path.glob("packed*"))


def outside(path):
    """Replace a file or folder by a link to where it was moved, out of the model."""
    folder = next(p for p in path.parents if p.name == "model")
    target = folder.with_name(f"elsewhere-{path.name}")
    path.rename(target)
    path.symlink_to(target)


LINKS = {
    "a file": ("tokenizer.json", outside),
    "a folder": ("additional_chat_templates", outside),
    "a file in a folder": ("code/inner/a.py", outside),
    "to nothing": ("tokenizer.json", lambda p: (p.unlink(), p.symlink_to("nothing"))),
    "the config": ("config.json", outside),
}


@pytest.mark.parametrize("row", LINKS)
def test_links_that_lead_out_are_refused_by_name(row, model, tmp_path):
    name, damage = LINKS[row]
    damage(model / name)
    match = f"{name}.* is a link"
    with pytest.raises(CheckpointError, match=match) as error:
        halve.prune(model, tmp_path / "out", solver="magnitude")
    assert "Download" not in str(error.value)
    with pytest.raises(CheckpointError, match=match):
        halve.plan(model, solver="magnitude")
    assert not list(tmp_path.glob("out*"))


def test_links_within_the_folder_are_followed(model, tmp_path):
    (model / "tokenizer.json").rename(model / "blob")
    (model / "tokenizer.json").symlink_to("blob")
    (model / "code/again").symlink_to("..")  # a circle
    halve.prune(model, tmp_path / "out", solver="magnitude")
    copied = tmp_path / "out/tokenizer.json"
    assert copied.read_bytes() == (model / "blob").read_bytes()
    assert not copied.is_symlink()


def test_an_output_within_the_model_is_not_copied_with_it(model):
    halve.prune(model, model / "half", solver="magnitude")
    halve.prune(model, model / "again", solver="magnitude")
    assert digests(model / "half") == digests(model / "again")
    assert os.listdir(model / "half") == os.listdir(model / "again")  # noqa: PTH208
