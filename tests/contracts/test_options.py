"""Options are declared once: the command line, API and documentation agree with it."""

import re
import runpy
import tomllib
from dataclasses import fields
from importlib.resources import files
from inspect import Parameter, signature
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import halve
from halve import options
from halve.cli.app import app
from halve.cli.options import command_options
from halve.errors import HalveError
from halve.grids import parse_scheme
from halve.option import PANELS, option_of
from halve.options import (
    BenchKeywords,
    BenchOptions,
    EvalKeywords,
    EvalOptions,
    GenerateKeywords,
    GenerateOptions,
    PackOptions,
    PruneKeywords,
    PruneOptions,
    RunKeywords,
    RunOptions,
    TaskKeywords,
    TaskOptions,
)
from halve.records import Progress
from halve.solvers import SOLVERS

REPOSITORY = Path(__file__).parents[2]
KEYWORDS = {
    RunKeywords: (RunOptions,),
    PruneKeywords: (PruneOptions, RunOptions),
    EvalKeywords: (EvalOptions,),
    BenchKeywords: (BenchOptions,),
    GenerateKeywords: (GenerateOptions,),
    TaskKeywords: (TaskOptions,),
}
# Function -> the options classes whose fields it accepts, or a part of them.
FUNCTIONS = {
    "prune": (PruneOptions, RunOptions),
    "plan": (PruneOptions, RunOptions),
    "perplexity": (EvalOptions,),
    "compare": (EvalOptions,),
    "evaluate_tasks": (TaskOptions,),
    "bench": (BenchOptions,),
    "generate": (GenerateOptions,),
}
CLASSES = (
    PruneOptions,
    RunOptions,
    EvalOptions,
    PackOptions,
    BenchOptions,
    GenerateOptions,
    TaskOptions,
)
NAMES = {"Progress": Progress}


def bare_types(options_class):
    """Return field -> type, without the option that annotates it."""
    return get_type_hints(options_class, localns=NAMES)


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_keywords_are_the_fields_with_their_types(keywords):
    expected = {}
    for options_class in KEYWORDS[keywords]:
        expected |= bare_types(options_class)
    assert get_type_hints(keywords, localns=NAMES) == expected
    assert not keywords.__required_keys__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_signature_shows_every_option_with_its_default(name):
    parameters = signature(getattr(halve, name)).parameters
    for options_class in FUNCTIONS[name]:
        for field in fields(options_class):
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind is Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unknown_keywords_are_refused(name):
    positional = ["model", "other"][
        : 1 + (name in ("prune", "compare", "evaluate_tasks", "generate"))
    ]
    with pytest.raises(TypeError, match="sparsety"):
        getattr(halve, name)(*positional, sparsety="50%")


def test_keywords_override_the_fields_of_an_object(monkeypatch):
    given = []
    monkeypatch.setattr("halve.api.pruning.prune_model", lambda *a: given.extend(a[2:]))
    base = PruneOptions(sparsity="60%", seed=1)
    halve.prune("model", "out", options=base, seed=2, memory=3)
    assert given == [PruneOptions(sparsity="60%", seed=2), RunOptions(memory=3)]


@pytest.mark.parametrize("options_class", CLASSES)
def test_every_field_but_progress_has_help(options_class):
    for field in fields(options_class):
        if field.name != "progress":
            option = option_of(field.type)
            assert option is not None, field.name
            assert option.help.endswith("."), field.name
            assert option.panel in ("", *PANELS), field.name


def test_choices_are_the_names_that_exist():
    assert set(options.SOLVER_CHOICES) == {"auto", *SOLVERS}
    for name in options.QUANTIZE_CHOICES:
        parse_scheme(name)
    with pytest.raises(HalveError) as error:
        parse_scheme("nonesuch")
    named = re.findall(r"int\d+", str(error.value))
    assert set(named) == set(options.QUANTIZE_CHOICES)


@pytest.mark.parametrize("solver", SOLVERS)
def test_published_solvers_are_as_published_by_default(solver):
    defaults = PruneOptions(solver=solver)
    assert defaults.corrects == (solver == "admm")
    assert defaults.diagonal_ridge == (1 if solver == "admm" else 0)
    chosen = PruneOptions(solver=solver, ridge=0.2, sequential=True)
    assert (chosen.diagonal_ridge, chosen.corrects) == (0.2, True)


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda c: c.name)
def test_the_flags_of_a_command_differ(command):
    declared = command_options(command.callback.__wrapped__)
    flags = [flag for option in declared for flag in option.option.flags]
    assert len(flags) == len(set(flags))
    assert len(declared) == len({option.name for option in declared})


@pytest.mark.parametrize(
    ("options_class", "values", "mentions"),
    [
        (EvalOptions, {"segments": 0}, ("segments", "0", "--segments")),
        (BenchOptions, {"prompt": -1}, ("prompt", "-1", "--pp")),
        (BenchOptions, {"batches": (4, 0)}, ("batches", "0", "--batch")),
        (BenchOptions, {"threads": 10**9}, ("threads", "--threads")),
        (PruneOptions, {"damping": 2.0}, ("damping", "2.0", "--damping")),
        (PruneOptions, {"ridge": -1.5}, ("ridge", "-1.5", "--ridge")),
        (
            PruneOptions,
            {"solver": "magnitude", "damping": 0.1},
            ("damping", "magnitude"),
        ),
        (PruneOptions, {"solver": "wanda", "ridge": 1.0}, ("ridge", "--solver")),
        (PruneOptions, {"seq_len": 0}, ("seq_len", "0", "--seq-len")),
        (PruneOptions, {"group_size": 64}, ("group_size", "--quantize")),
        (PruneOptions, {"target_bits": 3.0, "quantize": "int4"}, ("--target-bits",)),
        (PruneOptions, {"samples": 1}, ("samples", "1", "--samples")),
        (PruneOptions, {"sparsity": "60"}, ("'60'", "Write 60%")),
        (PruneOptions, {"rules": ("down_proj",)}, ("down_proj", "--rule")),
        (PruneOptions, {"rules": ("a(=70%",)}, ("a(", "regular expression")),
        (PruneOptions, {"rules": ("a=170%",)}, ("170%",)),
        (PruneOptions, {"skip": ("[",)}, ("[", "--skip")),
        (
            PruneOptions,
            {"skip": ("a",), "allocation": "error"},
            ("allocation", "--skip"),
        ),
        (
            PruneOptions,
            {"skip": ("a",), "target_bits": 3.0},
            ("target_bits", "--skip"),
        ),
        (GenerateOptions, {"top_k": 5}, ("top_k", "--temperature")),
        (GenerateOptions, {"temperature": -1.0}, ("temperature", "--temperature")),
        (GenerateOptions, {"top_p": 0.0, "temperature": 1.0}, ("top_p", "--top-p")),
    ],
    ids=str,
)
def test_messages_serve_both_python_and_the_command_line(
    options_class, values, mentions
):
    with pytest.raises(HalveError) as error:
        options_class(**values).check()
    assert all(phrase in str(error.value) for phrase in mentions)


@pytest.mark.parametrize("options_class", CLASSES)
def test_defaults_are_valid(options_class):
    if hasattr(options_class, "check"):
        options_class().check()


def test_the_reference_page_is_what_its_generator_makes():
    tool = runpy.run_path(str(REPOSITORY / "tools" / "reference.py"))
    page = (REPOSITORY / "docs" / "api" / "options.md").read_text("utf-8")
    assert page == tool["reference"](), "run python tools/reference.py"


def test_the_python_page_names_everything_public():
    page = (REPOSITORY / "docs" / "api" / "python.md").read_text("utf-8")
    for name in halve.__all__:
        assert f"`{name}`" in page or f"`{name}(" in page, name


def test_everything_public_exists_and_has_a_docstring():
    for name in halve.__all__:
        assert getattr(halve, name).__doc__, name
    assert set(halve.__all__) <= set(dir(halve))
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = halve.nonesuch


def test_functions_stay_functions_when_every_module_is_imported():
    """A submodule of the same name would replace the function on its import."""
    for name in halve.__all__:
        assert not (files("halve") / f"{name}.py").is_file(), name
        assert not (files("halve") / name).is_dir(), name


def test_the_version_is_written_once():
    text = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    assert halve.__version__ == tomllib.loads(text)["project"]["version"]


def test_the_package_is_marked_as_typed():
    assert (files("halve") / "py.typed").is_file()


def test_annotated_types_are_plain():
    """Typer parses these; a new type needs a parser in halve.cli.options."""
    plain = {str, int, float, bool, tuple[int, ...], tuple[str, ...], str | float}
    optional = {kind | None for kind in (str, int, float, bool, str | float)}
    for options_class in CLASSES:
        for field in fields(options_class):
            if option_of(field.type) is not None:
                assert get_args(field.type)[0] in plain | optional, field.name
