"""Invalid arguments, texts and output folders are refused; no file is changed."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet

from halve import prune
from halve.checkpoint import disk
from tests.hostile import spoilers as by

FEW = ("--samples", 4, "--seq-len", 16, "--quiet", "--device", "cpu")


@pytest.fixture
def prune_refused(refused, pico, text, tmp_path):
    """Return a function that prunes a valid model with some invalid arguments."""

    def run(*arguments, model=None, out=None, calibration=text, **expected):
        return refused(
            *("prune", model or pico("llama"), "-o", out or tmp_path / "out"),
            *("--calibration", calibration, *FEW, *arguments),
            **expected,
        )

    return run


ARGUMENTS = {
    "more than all": (("--sparsity", "1.5"), ("'1.5'", "50%")),
    "all": (("--sparsity", "100%"), ("'100%'", "50%")),
    "none": (("--sparsity", "0"), ("'0'", "50%")),
    "none of any matrix": (("--sparsity", "1e-9"), ("prunes nothing", "50%")),
    "all but a hair": (("--sparsity", "0.9999999999"), ("prunes all", "q_proj")),
    "negative": (("--sparsity", "-50%"), ("'-50%'", "50%")),
    "not a number": (("--sparsity", "nan"), ("'nan'", "50%")),
    "endless": (("--sparsity", "inf"), ("'inf'", "50%")),
    "a word": (("--sparsity", "abc"), ("'abc'", "50%")),
    "nothing": (("--sparsity", ""), ("''", "50%")),
    "more kept than there are": (("--sparsity", "4:2"), ("'4:2'", "2:4")),
    "none kept": (("--sparsity", "0:4"), ("'0:4'", "2:4")),
    "all kept": (("--sparsity", "4:4"), ("'4:4'", "2:4")),
    "groups that do not fit": (("--sparsity", "2:7"), ("q_proj", "64", "2:7")),
    "huge groups": (("--sparsity", f"1:{10**30}"), ("q_proj", "64")),
    "unknown solver": (("--solver", "nonesuch"), ("nonesuch", "sparsegpt")),
    "no samples": (("--samples", 0), ("samples", "0")),
    "negative samples": (("--samples", -1), ("samples", "-1")),
    "no length": (("--seq-len", 0), ("seq_len", "0")),
    "too long": (("--seq-len", 129), ("129", "128")),
    "no block size": (("--block-size", 0), ("block_size", "0")),
    "negative damping": (("--damping", -1), ("damping", "-1")),
    "too much damping": (("--damping", 2), ("damping", "2")),
    "damping no number": (("--damping", "nan"), ("damping", "nan")),
    "negative ridge": (("--ridge", -1), ("ridge", "-1")),
    "ridge no number": (("--ridge", "nan"), ("ridge", "nan")),
    "unknown allocation": (("--allocation", "owl"), ("owl", "uniform", "error")),
    "allocation of n:m": (
        ("--allocation", "error", "--sparsity", "2:4"),
        ("2:4", "--allocation uniform"),
    ),
    "unknown device": (("--device", "nonesuch"), ("nonesuch", "cpu")),
    "no such device": (("--device", "cuda:99"), ("cuda:99", "cpu")),
    "no device": (("--device", ""), ("device", "cpu")),
    "unknown data set": (("--calibration", "nonesuch"), ("nonesuch", "stdlib")),
    "known data set, no hub": (("--calibration", "c4"), ("c4", "stdlib")),
    "endless name": (("--calibration", "word " * 1000), ("word", "file")),
    "unknown home": (("--calibration", "~nobody-here/a.txt"), ("nobody", "file")),
    "too few tokens": (("--samples", 10**7), ("tokens", "--samples")),
}


def test_a_device_without_memory_is_refused(prune_refused):
    prune_refused("--device", "meta", mentions=("meta", "cpu"))


@pytest.mark.parametrize("row", ARGUMENTS)
def test_bad_arguments_are_refused(row, prune_refused):
    words, mentions = ARGUMENTS[row]
    prune_refused(*words, mentions=mentions)


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "nonesuch"),
        ("--seq-len", 129),
        ("--seq-len", 1),
        ("--device", "nonesuch"),
        ("--data", "missing.txt"),
    ],
    ids=str,
)
def test_bad_arguments_of_eval_are_refused(words, refused, pico, text):
    refused("eval", pico("llama"), "--data", text, "--quiet", *words)


MODELS = {
    "no such folder": ("./nonesuch", ("nonesuch", "path")),
    "no such folder, absolute": ("/nonesuch/folder", ("/nonesuch/folder", "path")),
    "no such model": ("nonesuch", ("nonesuch", "network")),
    "hub unreachable": ("facebook/opt-125m", ("facebook/opt-125m", "network")),
    "no valid name": ("a b", ("a b", "name")),
    "endless": ("a" * 5000, ("path",)),
    "unknown home": ("~nobody-here/model", ("~nobody-here", "path")),
    "a file": (__file__, ("is a file", "folder")),
}
COMMANDS = {
    "prune": lambda model, text, out: ("prune", model, "-o", out),
    "eval": lambda model, text, out: ("eval", model, "--data", text),
    "inspect": lambda model, text, out: ("inspect", model),
    "generate": lambda model, text, out: ("generate", model, "def"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("row", MODELS)
def test_models_that_do_not_exist(row, command, refused, text, tmp_path):
    name, mentions = MODELS[row]
    words = COMMANDS[command](name, text, tmp_path / "out")
    refused(*words, mentions=mentions)


def test_hub_that_refuses_connections(prune_refused, monkeypatch):
    """As without a network, but through every layer of huggingface_hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    prune_refused(model="someone/model", mentions=("someone/model", "network"))


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, format, *args):
        pass


def test_hub_without_such_a_model(prune_refused, monkeypatch):
    hub = HTTPServer(("127.0.0.1", 0), _NotFound)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    prune_refused(model="someone/model", mentions=("someone/model", "on the Hub"))
    hub.shutdown()


def test_against_a_model_with_another_tokenizer(refused, pico, text, tmp_path):
    other = shutil.copytree(pico("llama"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:500]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("--data", text, "--seq-len", 16, "--quiet")
    mentions = ("same tokens", "tokenizer")
    refused("eval", pico("llama"), "--against", other, *words, mentions=mentions)


TOKENIZERS = {
    "missing": by.both(by.remove("tokenizer.json"), by.remove("tokenizer_config.json")),
    "garbage": by.text("tokenizer.json", "garbage"),
    "empty object": by.text("tokenizer.json", "{}"),
    "list": by.text("tokenizer.json", "[]"),
    "config is garbage": by.text("tokenizer_config.json", "garbage"),
    "config is a list": by.text("tokenizer_config.json", "[]"),
}


@pytest.mark.parametrize("row", TOKENIZERS)
def test_tokenizers_that_cannot_be_loaded(row, prune_refused, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "spoilt")
    TOKENIZERS[row](model)
    prune_refused(model=model, mentions=("tokenizer", "spoilt"))


TEXTS = {
    "missing.txt": (None, ("missing.txt",)),
    "missing.jsonl": (None, ("missing.jsonl",)),
    "empty.txt": (b"", ("empty.txt", "no text")),
    "blank.txt": (b" \n\t\n", ("blank.txt", "no text")),
    "short.txt": (b"A few words.", ("short.txt", "--samples")),
    "latin.txt": ("é".encode("latin-1"), ("latin.txt", "UTF-8")),
    "words.csv": (b"text\nwords\n", ("words.csv", ".jsonl")),
    "words": (b"words", ("words", ".jsonl")),
    "empty.jsonl": (b"", ("empty.jsonl", "no text")),
    "broken.jsonl": (b'{"text": "words"}\n{"text', ("broken.jsonl", "`text`")),
    "deep.jsonl": (b"[" * 100_000, ("deep.jsonl", "`text`")),
    "textless.jsonl": (b'{"words": "text"}', ("textless.jsonl", "`text`")),
    "list.jsonl": (b'["text"]', ("list.jsonl", "`text`")),
    "number.jsonl": (b"7", ("number.jsonl", "`text`")),
    "null.jsonl": (b'{"text": null}', ("null.jsonl", "`text`")),
    "garbage.parquet": (b"garbage", ("garbage.parquet", "`text`")),
    "empty.parquet": (b"", ("empty.parquet", "`text`")),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be_used(name, prune_refused, tmp_path):
    contents, mentions = TEXTS[name]
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    prune_refused(calibration=tmp_path / name, mentions=mentions)


@pytest.mark.parametrize("column", [{"words": ["a"]}, {"text": [7]}, {"text": [None]}])
def test_parquet_without_text(column, prune_refused, tmp_path):
    parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    prune_refused(calibration=path, mentions=("a.parquet", "`text`"))


def test_a_folder_is_not_a_text(prune_refused, tmp_path):
    (tmp_path / "texts").mkdir()
    prune_refused(calibration=tmp_path / "texts", mentions=("texts",))


def _file(out):
    out.write_text("mine")


def _full_folder(out):
    out.mkdir()
    (out / "mine").write_text("mine")


def _foreign_partial(out):
    _full_folder(out.with_name("out.partial"))


def _partial_is_a_file(out):
    _file(out.with_name("out.partial"))


def _partial_with(name, contents):
    def make(out):
        partial = out.with_name("out.partial")
        partial.mkdir()
        (partial / name).write_text(contents)

    return make


def _out_with_record(contents):
    def make(out):
        out.mkdir()
        (out / "halve.json").write_text(contents)

    return make


def _link_to_nothing(out):
    out.symlink_to(out.with_name("nothing"))


LEDGER = "ledger.jsonl"
OUTPUTS = {
    "a file": (_file, ("exists", "out")),
    "a full folder": (_full_folder, ("exists", "out")),
    "a link to nothing": (_link_to_nothing, ("out",)),
    "foreign partial": (_foreign_partial, ("out.partial", "mine")),
    "partial is a file": (_partial_is_a_file, ("out.partial",)),
    "ledger of garbage": (_partial_with(LEDGER, "garbage\n"), ("out.partial",)),
    "ledger of numbers": (_partial_with(LEDGER, "7\n"), ("out.partial",)),
    "ledger of objects": (_partial_with(LEDGER, "{}\n"), ("out.partial",)),
    "partial record": (_partial_with("halve.json", "{}"), ("out.partial",)),
    "partial garbage": (_partial_with("halve.json", "garbage"), ("out.partial",)),
}
RECORDS = ("garbage", "{}", "7", '{"blocks": 7}')


@pytest.mark.parametrize("row", OUTPUTS)
def test_outputs_that_exist(row, prune_refused, tmp_path):
    make, mentions = OUTPUTS[row]
    make(tmp_path / "out")
    prune_refused(mentions=mentions)


@pytest.mark.parametrize("contents", RECORDS)
def test_outputs_with_a_foreign_record(contents, prune_refused, tmp_path):
    _out_with_record(contents)(tmp_path / "out")
    prune_refused(mentions=("out", "halve.json"))


def test_output_that_is_the_model(prune_refused, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "model")
    prune_refused(model=model, out=model, mentions=("is the model itself",))
    (tmp_path / "link").symlink_to(model)
    prune_refused(model=model, out=tmp_path / "link", mentions=("model itself",))


def test_model_in_the_folder_of_the_work(prune_refused, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "out.partial")
    prune_refused(model=model, mentions=("out.partial",))


OUT_NAMES = {
    "below a file": ("taken/out", ("taken",)),
    "nearly endless": ("a" * 250, ("aaa",)),
    "the root": ("/", ("/",)),
    "no name": ("", ("exists",)),
}


@pytest.mark.parametrize("row", OUT_NAMES)
def test_outputs_that_cannot_be_created(
    row, refused, pico, text, tmp_path, monkeypatch
):
    name, mentions = OUT_NAMES[row]
    (tmp_path / "taken").write_text("mine")
    monkeypatch.chdir(tmp_path)
    words = ("-o", name, "--calibration", text, *FEW)
    refused("prune", pico("llama"), *words, mentions=mentions)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-here/out"], ids=["long", "home"])
def test_outputs_that_cannot_be_looked_up(name, refused, pico, text, tmp_path):
    words = ("-o", name, "--calibration", text, *FEW)
    refused("prune", pico("llama"), *words)


def test_work_of_other_arguments_is_kept(prune_refused, tmp_path, monkeypatch):
    """A run that failed half-way is not resumed by one with other options."""
    monkeypatch.setattr("halve.checkpoint.disk.save_file", _full_disk)
    prune_refused(mentions=("disk is full",), started=True)
    words = ("--sparsity", "2:4", "--seed", 1)
    prune_refused(*words, mentions=("sparsity", "50%", "2:4", "seed"))


def test_a_locked_folder_is_left_alone(prune_refused, tmp_path):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        prune_refused(mentions=("Another run", "out.partial"))
    finally:
        os.close(descriptor)


def _full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_disk_known_to_be_too_small(prune_refused, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    prune_refused(mentions=("free", "GiB"))


def test_too_little_space_for_hidden_states(prune_refused, monkeypatch):
    monkeypatch.setattr("os.posix_fallocate", _full_disk)
    words = ("--activation-memory", "1")
    prune_refused(*words, mentions=("hidden states", "GiB"), started=True)


@pytest.mark.parametrize("full_at", [1, 2, 3])
def test_a_disk_that_fills_up_loses_nothing(
    full_at, prune_refused, pico, text, tmp_path, monkeypatch
):
    real, calls = disk.save_file, []

    def fills_up(*arguments):
        calls.append(1)
        return _full_disk() if len(calls) == full_at else real(*arguments)

    monkeypatch.setattr(disk, "save_file", fills_up)
    prune_refused(mentions=("disk is full", "to resume"), started=True)
    options = {"calibration": str(text), "samples": 4, "seq_len": 16, "device": "cpu"}
    prune(pico("llama"), tmp_path / "out", **options)
    prune(pico("llama"), tmp_path / "whole", **options)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "halve.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_the_installed_command_prints_one_line(pico, tmp_path):
    """In a new process, in which libraries could warn on standard error."""
    model = shutil.copytree(pico("llama"), tmp_path / "spoilt")
    by.code(model)
    run = subprocess.run(
        [sys.executable, "-m", "halve", "inspect", model],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("Error: ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "code-ran").exists()


PROMPTS = {
    "empty": ("", ("prompt",)),
    "longer than the model": ("word " * 200, ("128",)),
}


@pytest.mark.parametrize("row", PROMPTS)
def test_prompts_that_cannot_be_continued(row, refused, pico):
    prompt, mentions = PROMPTS[row]
    refused("generate", pico("opt"), prompt, mentions=mentions)


@pytest.mark.parametrize("row", ["missing", "garbage"])
def test_generate_without_a_tokenizer(row, refused, pico, tmp_path):
    model = shutil.copytree(pico("llama"), tmp_path / "spoilt")
    TOKENIZERS[row](model)
    refused("generate", model, "def", mentions=("tokenizer",))
