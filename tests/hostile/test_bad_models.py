"""A damaged model is refused in two sentences, and no file is changed.

A new kind of damage is one row: its name, a function that damages a valid Llama, and
what the message must mention.
"""

import shutil

import pytest
import torch
from transformers import AutoConfig

from tests.hostile import spoilers as by

KIND = ("causal language model",)
NAN, INFINITY = float("nan"), float("inf")
BLOCK = "model.layers.1"

CONFIGS = {
    "missing": (by.remove("config.json"), ("config.json",)),
    "empty": (by.data("config.json", b""), ("config.json",)),
    "not json": (by.text("config.json", "{"), ("config.json",)),
    "not text": (by.data("config.json", b"\xff\xfe\x00"), ("config.json",)),
    "list": (by.text("config.json", "[]"), ("config.json",)),
    "number": (by.text("config.json", "7"), ("config.json",)),
    "null": (by.text("config.json", "null"), ("config.json",)),
    "nested too deeply": (by.text("config.json", "[" * 100_000), ("config.json",)),
    "no model type": (by.text("config.json", "{}"), KIND),
    "unknown model type": (by.config(model_type="nonesuch"), ("nonesuch",)),
    "model type is a number": (by.config(model_type=7), KIND),
    "model type is a list": (by.config(model_type=["llama"]), KIND),
    "negative width": (by.config(hidden_size=-64), KIND),
    "width is text": (by.config(hidden_size="64"), KIND),
    "width is a list": (by.config(hidden_size=[64]), KIND),
    "width of 0": (by.config(hidden_size=0), ("config asks for",)),
    "width is huge": (by.config(hidden_size=2**60), ("hidden_size",)),
    "width not an integer": (by.config(hidden_size=64.5), KIND),
    "negative vocabulary": (by.config(vocab_size=-1), KIND),
    "vocabulary is text": (by.config(vocab_size="many"), KIND),
    "no heads": (by.config(num_attention_heads=0), KIND),
    "odd heads": (by.config(num_attention_heads=7), KIND),
    "no blocks": (by.config(num_hidden_layers=0), ("no decoder blocks",)),
    "negative blocks": (by.config(num_hidden_layers=-2), ("no decoder blocks",)),
    "blocks are text": (by.config(num_hidden_layers="two"), KIND),
    "fewer blocks": (by.config(num_hidden_layers=1), (BLOCK, "config asks for")),
    "millions of blocks": (
        by.config(num_hidden_layers=10**7),
        ("num_hidden_layers", "10000000"),
    ),
    "more blocks": (by.config(num_hidden_layers=3), ("model.layers.2",)),
    "unknown activation": (by.config(hidden_act="nonesuch"), ("nonesuch",)),
    "activation is a number": (by.config(hidden_act=3), KIND),
    "unknown dtype": (by.config(dtype="nonesuch"), KIND),
    "architectures is text": (by.config(architectures="nonesuch"), ("nonesuch",)),
    "architectures is a list of lists": (by.config(architectures=[[]]), KIND),
    "architectures is a number": (by.config(architectures=1), KIND),
    "masked": (by.config(architectures=["BertForMaskedLM"]), ("BertForMaskedLM",)),
    "quantised": (
        by.config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("quantized", "gptq"),
    ),
    "quantised by nothing": (by.config(quantization_config={}), ("quantized",)),
    "quantised is text": (by.config(quantization_config="fp8"), ("quantized",)),
    "compressed": (
        by.config(compression_config={"format": "marlin-24"}),
        ("quantized", "compressed-tensors, marlin-24"),
    ),
    "custom code": (
        by.config(
            model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"}
        ),
        ("--trust-remote-code",),
    ),
    "custom code of another repository": (
        by.config(
            model_type="own", auto_map={"AutoConfig": "someone/else--own.OwnConfig"}
        ),
        ("--trust-remote-code",),
    ),
    "code map is text": (by.config(model_type="own", auto_map="own"), KIND),
}
WEIGHTS = {
    "missing": (by.remove(by.WEIGHTS), ("no weights",)),
    "empty": (by.truncate(0), (by.WEIGHTS, "damaged")),
    "four bytes": (by.truncate(4), (by.WEIGHTS, "damaged")),
    "half a header": (by.truncate(300), (by.WEIGHTS, "damaged")),
    "half the data": (by.truncate(-100_000), (by.WEIGHTS, "damaged")),
    "one byte less": (by.truncate(-1), (by.WEIGHTS, "damaged")),
    "header is huge": (by.raw_header(b"{}", 2**62), (by.WEIGHTS, "damaged")),
    "header past the end": (by.raw_header(b"{}", 100), (by.WEIGHTS, "damaged")),
    "header is garbage": (by.raw_header(b"\xff" * 64), (by.WEIGHTS, "damaged")),
    "header is a list": (by.raw_header(b"[]"), (by.WEIGHTS, "damaged")),
    "header is empty": (by.raw_header(b"{}"), ("no tensor",)),
    "header holds a list": (by.raw_header(b'{"a":[]}'), (by.WEIGHTS, "damaged")),
    "offsets past the end": (
        by.entry(data_offsets=[2**40, 2**40 + 16384]),
        (by.WEIGHTS, "damaged"),
    ),
    "offsets overlap": (by.entry(data_offsets=[0, 16384]), (by.WEIGHTS, "damaged")),
    "offsets swapped": (by.entry(data_offsets=[16384, 0]), (by.WEIGHTS, "damaged")),
    "negative offsets": (by.entry(data_offsets=[-4, 16380]), (by.WEIGHTS, "damaged")),
    "shape too large": (by.entry(shape=[2**40, 2**40]), (by.WEIGHTS, "damaged")),
    "negative shape": (by.entry(shape=[-64, -64]), (by.WEIGHTS, "damaged")),
    "unknown dtype": (by.entry(dtype="F12"), (by.WEIGHTS, "damaged")),
    "complex dtype": (
        by.tensor(by.QUERY, lambda t: t.to(torch.complex64)),
        (by.QUERY, "dtype"),
    ),
    "eight bits": (
        by.tensor(by.QUERY, lambda t: t.to(torch.float8_e4m3fn)),
        (by.QUERY, "dtype"),
    ),
    "link out of the folder": (by.link_out, ("link out",)),
    "a tensor missing": (by.tensor(by.QUERY, lambda t: None), (by.QUERY,)),
    "head missing": (by.tensor("lm_head.weight", lambda t: None), ("lm_head",)),
    "other shape": (by.tensor(by.QUERY, lambda t: t[:32]), (by.QUERY, "[32, 64]")),
    "flat": (by.tensor(by.QUERY, lambda t: t.flatten()), (by.QUERY, "[4096]")),
    "name with escapes": (
        by.both(
            by.header(lambda h: h.update({"\x1b[2J\n": h.pop(by.QUERY)})),
            by.index(lambda i: i["weight_map"].update({"\x1b[2J\n": "\x1b[2J\n"})),
        ),
        ("\\x1b",),
    ),
}
INDEXES = {
    "a shard missing": (by.indexed_as("other.safetensors"), ("other.safetensors",)),
    "not in its shard": (
        by.index(lambda i: i["weight_map"].update({"a.b": by.SHARD})),
        ("a.b", by.SHARD),
    ),
    "in another shard": (
        by.both(
            lambda folder: shutil.copy(folder / by.WEIGHTS, folder / "b.safetensors"),
            by.indexed_as("b.safetensors"),
        ),
        ("b.safetensors", "both"),
    ),
    "above the folder": (
        by.outside("../outside.safetensors"),
        ("../outside.safetensors", "bare file name"),
    ),
    "absolute path": (
        by.outside("{parent}/outside.safetensors"),
        ("outside.safetensors", "bare file name"),
    ),
    "link out of the folder": (by.both(by.link_out, by.index()), ("link out",)),
    "a folder": (by.indexed_as("."), ("bare file name",)),
    "no name": (by.indexed_as(""), ("bare file name",)),
    "null byte": (by.indexed_as("a\0b"), ("not there",)),
    "unpaired surrogate": (by.indexed_as("\ud800"), ("not there",)),
    "name of 5000 characters": (by.indexed_as("a" * 5000), ("not there",)),
    "number": (by.index_text("7"), (by.INDEX,)),
    "list": (by.index_text("[]"), (by.INDEX,)),
    "not json": (by.index_text("{"), (by.INDEX,)),
    "empty": (by.index_text(" "), (by.INDEX,)),
    "nested too deeply": (by.index_text("[" * 100_000), (by.INDEX,)),
    "no map": (by.index_text("{}"), (by.INDEX,)),
    "map is a list": (by.index(lambda i: {"weight_map": []}), (by.INDEX,)),
    "map is null": (by.index(lambda i: {"weight_map": None}), (by.INDEX,)),
    "map is empty": (by.index(lambda i: {"weight_map": {}}), ("no tensor",)),
    "shard is a number": (by.index(lambda i: {"weight_map": {"a": 1}}), (by.INDEX,)),
    "shard is a list": (by.index(lambda i: {"weight_map": {"a": []}}), (by.INDEX,)),
}
PICKLES = {
    "empty": (by.data(by.BIN, b""), (by.BIN, "damaged")),
    "random bytes": (by.data(by.BIN, bytes(range(256)) * 9), (by.BIN, "damaged")),
    "starts as an archive": (by.data(by.BIN, b"PK\3\4" * 99), (by.BIN, "damaged")),
    "text": (by.data(by.BIN, b"version https://git-lfs"), (by.BIN, "damaged")),
    "code": (by.code, (by.BIN, "code")),
    "code in an archive": (by.code_in_archive, (by.BIN, "code")),
    "a list": (by.saved([torch.zeros(2)]), (by.BIN, "damaged")),
    "a tensor": (by.saved(torch.zeros(2)), (by.BIN, "damaged")),
    "no tensors": (by.saved({"a": 1}), (by.BIN, "damaged")),
    "nothing": (by.saved({}), (by.BIN, "damaged")),
    "state is a number": (by.saved({"state_dict": 7}), (by.BIN, "damaged")),
    "names are numbers": (by.saved({1: torch.zeros(2)}), (by.BIN, "damaged")),
    "sparse": (
        by.changed_bin(lambda t: t.update({by.QUERY: t[by.QUERY].to_sparse()})),
        (by.BIN, by.QUERY),
    ),
    "complex": (
        by.changed_bin(lambda t: t.update({by.QUERY: t[by.QUERY] + 0j})),
        (by.QUERY, "dtype"),
    ),
    "a tensor missing": (by.changed_bin(lambda t: t.pop(by.QUERY)), (by.QUERY,)),
}
EARLY = {
    f"{kind}: {name}": row
    for kind, rows in {
        "config": CONFIGS,
        "weights": WEIGHTS,
        "index": INDEXES,
        "pickle": PICKLES,
    }.items()
    for name, row in rows.items()
}


@pytest.fixture
def damaged(pico, tmp_path):
    """Return a function that copies a valid Llama and damages the copy."""

    def make(spoil: by.Spoiler, **options):
        folder = shutil.copytree(pico("llama", **options), tmp_path / "damaged")
        spoil(folder)
        return folder

    return make


@pytest.fixture
def prune_refused(refused, text, tmp_path):
    def run(model, *options, **expected):
        few = ("--samples", 4, "--seq-len", 16, "--quiet", "--device", "cpu")
        out = ("-o", tmp_path / "out", "--calibration", text)
        return refused("prune", model, *out, *few, *options, **expected)

    return run


@pytest.mark.parametrize("row", EARLY)
def test_damaged_files_are_refused_before_work_starts(
    row, damaged, prune_refused, tmp_path
):
    spoil, mentions = EARLY[row]
    prune_refused(damaged(spoil), mentions=mentions)
    assert not (tmp_path / "code-ran").exists()


NUMBERS = {
    "NaN in a matrix": (by.one_value(by.QUERY, NAN), (by.QUERY,)),
    "infinity in a matrix": (by.one_value(by.QUERY, INFINITY), (by.QUERY,)),
    "NaN in a norm": (
        by.one_value(f"{BLOCK}.input_layernorm.weight", NAN),
        (f"{BLOCK}.input_layernorm.weight",),
    ),
    "NaN in the embedding": (
        by.one_value("model.embed_tokens.weight", NAN),
        ("model.embed_tokens.weight",),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", NUMBERS)
def test_weights_that_are_not_finite_are_named(row, dtype, damaged, prune_refused):
    spoil, mentions = NUMBERS[row]
    prune_refused(damaged(spoil, dtype=dtype), mentions=mentions, started=True)


def test_a_head_that_is_not_finite_is_named(damaged, prune_refused):
    model = damaged(by.one_value("lm_head.weight", NAN))
    prune_refused(model, mentions=("lm_head.weight",), started=True)


@pytest.mark.parametrize("solver", ["magnitude", "sparsegpt"])
def test_matrices_of_integers_are_refused(solver, damaged, prune_refused):
    model = damaged(by.tensor(by.QUERY, lambda t: t.to(torch.int32)))
    prune_refused(model, "--solver", solver, mentions=(by.QUERY, "torch.int32"))


def small_vocabulary(folder):
    by.config(vocab_size=300)(folder)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        by.tensor(name, lambda old: old[:300])(folder)


@pytest.mark.parametrize("reader", ["prune", "eval"])
def test_tokens_outside_the_vocabulary(reader, damaged, refused, text, tmp_path):
    options = {
        "prune": ("-o", tmp_path / "out", "--calibration", text, "--samples", 4),
        "eval": ("--data", text),
    }
    common = ("--seq-len", 16, "--quiet")
    model = damaged(small_vocabulary)
    refused(reader, model, *options[reader], *common, mentions=("tokenizer", "300"))


RUNTIME = {  # fail only when the model runs
    "negative dropout": ("opt", by.config(dropout=-1)),
    "negative heads": ("opt", by.config(num_attention_heads=-1)),
    "no positions": ("gptj", by.config(n_positions=0)),
}


@pytest.mark.parametrize("row", RUNTIME)
def test_configs_that_fail_when_the_model_runs(row, pico, prune_refused, tmp_path):
    family, spoil = RUNTIME[row]
    model = shutil.copytree(pico(family), tmp_path / "damaged")
    spoil(model)
    prune_refused(model, mentions=("config",), started=True)


def test_activations_that_overflow_are_named_by_eval(damaged, refused, text):
    norm = f"{BLOCK}.post_attention_layernorm.weight"
    model = damaged(by.tensor(norm, lambda t: torch.full_like(t, 1e30)))
    options = ("--data", text, "--seq-len", 16, "--segments", 4, "--quiet")
    refused("eval", model, *options, mentions=(BLOCK, "sample"))


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
def test_every_solver_refuses_nan(solver, damaged, prune_refused):
    model = damaged(by.one_value(by.QUERY, NAN))
    prune_refused(model, "--solver", solver, mentions=(by.QUERY,), started=True)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_activations_that_overflow_are_named(solver, damaged, prune_refused):
    norm = f"{BLOCK}.post_attention_layernorm.weight"
    model = damaged(by.tensor(norm, lambda t: torch.full_like(t, 1e30)))
    mentions = (f"{BLOCK}.mlp.gate_proj", "sample")
    prune_refused(model, "--solver", solver, mentions=mentions, started=True)


FOREIGN = {
    "t5": ("t5", {"architectures": ["T5ForConditionalGeneration"]}),
    "t5, without architectures": ("t5", {}),
    "bert": ("bert", {"architectures": ["BertForMaskedLM"]}),
    "bert, without architectures": ("bert", {}),
    "vit": ("vit", {"architectures": ["ViTForImageClassification"]}),
    "vit, without architectures": ("vit", {}),
}


@pytest.mark.parametrize("row", FOREIGN)
def test_models_of_another_kind_are_refused(row, damaged, prune_refused):
    kind, options = FOREIGN[row]
    config = AutoConfig.for_model(kind, num_hidden_layers=2, **options)
    model = damaged(config.save_pretrained)
    prune_refused(model, mentions=("GPT-family",))


DAMAGES = {
    "no weights": WEIGHTS["missing"],
    "half the data": WEIGHTS["half the data"],
    "a tensor missing": WEIGHTS["a tensor missing"],
    "other shape": WEIGHTS["other shape"],
    "code": PICKLES["code"],
    "config is a list": CONFIGS["list"],
    "above the folder": INDEXES["above the folder"],
}
SHORT = ("--seq-len", 16, "--segments", 4, "--quiet")
READERS = {
    "eval": lambda model, good, text: ("eval", model, "--data", text, *SHORT),
    "against": lambda model, good, text: (
        *("eval", good, "--against", model, "--data", text),
        *SHORT,
    ),
    "inspect": lambda model, good, text: ("inspect", model),
    "generate": lambda model, good, text: ("generate", model, "def"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("row", DAMAGES)
def test_every_command_refuses_a_damaged_model(
    row, reader, damaged, refused, text, pico
):
    spoil, mentions = DAMAGES[row]
    model = damaged(spoil)
    refused(*READERS[reader](model, pico("llama"), text), mentions=mentions)
    assert not (model.parent / "code-ran").exists()
