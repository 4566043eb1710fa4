"""The pages of documentation agree with the code that they describe."""

import ast
import re
import runpy
import signal
from pathlib import Path

import click
import pytest
import yaml

import halve
from halve.cli.interruption import Interrupted

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))


def page(name):
    return (DOCS / name).read_text("utf-8")


def first_cells(text, heading):
    """Return the first cell of each row of the first table under a heading."""
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [row.split("|")[1].strip().strip("`") for row in rows[1:]]


def error_classes():
    """Return the names of HalveError and of all public classes derived from it."""
    bases = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {b.id for b in node.bases if isinstance(b, ast.Name)}
    found = {"HalveError"}
    while derived := {name for name in bases if bases[name] & found} - found:
        found |= derived
    return {name for name in found if not name.startswith("_")}


def constant_exits(path):
    """Return the numbers with which a module ends the process."""
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("exit", "Exit"))
    ]
    return {
        argument.value
        for call in calls
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    }


def test_every_error_class_stands_in_the_table_of_errors():
    listed = first_cells(page("troubleshooting.md"), "Errors")
    assert sorted(listed) == sorted(error_classes())


def test_every_exit_code_stands_in_the_table_of_exit_codes():
    codes = {0, click.UsageError.exit_code}
    codes |= {Interrupted(n).exit_code for n in (signal.SIGINT, signal.SIGTERM)}
    for path in (REPOSITORY / "src/halve/cli").glob("*.py"):
        codes |= constant_exits(path)
    listed = first_cells(page("troubleshooting.md"), "Exit codes")
    assert listed == [str(code) for code in sorted(codes)]


def test_the_record_schema_is_what_its_generator_makes():
    tool = runpy.run_path(str(REPOSITORY / "tools/record_schema.py"))
    assert page("record.md") == tool["page"](), "run python tools/record_schema.py"


@pytest.mark.parametrize("kind", [halve.PruneRecord, halve.PackRecord])
def test_the_record_schema_names_what_a_record_holds(kind):
    section = page("record.md").partition(f"\n### {kind.__name__}\n")[2]
    section = section.partition("\n### ")[0]
    listed = re.findall(r"^\| `(\w+)` ", section, re.MULTILINE)
    assert sorted(listed) == sorted(kind.__dataclass_fields__)


def test_every_page_stands_in_the_navigation():
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text("utf-8"))

    def pages(entries):
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else pages(value)

    present = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert set(pages(settings["nav"])) == present


def test_the_api_page_documents_everything_public():
    documented = set(
        re.findall(r"^::: ([\w.]+)", page("api/reference.md"), re.MULTILINE)
    )
    names = {name.rpartition(".")[2] for name in documented}
    errors = {name for name in halve.__all__ if issubclass_of_exception(name)}
    assert "halve.errors" in documented
    assert names >= set(halve.__all__) - errors


def issubclass_of_exception(name):
    value = getattr(halve, name)
    return isinstance(value, type) and issubclass(value, Exception)


def test_links_between_pages_lead_to_files():
    for path in [*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md")]:
        for target in re.findall(
            r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")
        ):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
