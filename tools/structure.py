"""Measure the structure of a source tree, to compare it before and after a change.

    python tools/structure.py [TREE] [--compare OTHER] [--package halve]

TREE is a checkout (the folder that holds src/) and defaults to this one; `--compare`
prints a second column for another checkout. Sources are parsed with `ast`; nothing of
the project is imported, so any version of it can be measured.

What is counted, over all Python files of the package:

- Lines of a function: the lines that hold code, from `def` to the end of its body.
  Decorators, the docstring, blank lines and lines with only a comment do not count;
  the lines of a nested function count for the outer function too.
- Median and 90th percentile: of the lines of all functions, nested ones and methods
  included. The percentile is the smallest length that at least 90 % do not exceed.
- Parameters of a function: positional, keyword-only, `*args` and `**kwargs`, without
  `self` or `cls`. Fields of a class: annotated names of its body, ClassVar excluded,
  and attributes that a method assigns on `self`.
- Fan-out of a module: distinct modules of the package that it imports, at the top or
  within a function or under TYPE_CHECKING. `from halve.records import X` counts for
  halve.records, `from halve import api` for halve.api.
- The module that prunes one block: pruning/prune_block.py, or pruning/block.py in
  older trees. Names imported: each name that an import statement of the package binds.
  Modules reached: those that a breadth-first walk over imports finds from there,
  without itself; the packages (`__init__`) that an import runs on its way are counted
  where they are imported by name, not because a module lies in them.
- Files that know a packed layout: those outside of formats/ that use something which
  holds for one layout only. That is anything imported, directly or by way of the
  package's `__init__`, from a module of formats that describes one layout (all but
  `NEUTRAL_MODULES`), a companion tensor by its name
  (`LAYOUT_IDENTIFIERS`), or the attribute `.parts` of a tensor's description, where
  that names no format: to have parts means there to be packed in the one layout. A
  `.parts` does not count in a folder where another class than TensorInfo has a field
  of that name.
"""

import argparse
import ast
import io
import math
import statistics
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef

LONG = 60
BLOCK_MODULES = ("pruning.prune_block", "pruning.block")
LAYOUT_IDENTIFIERS = {"weight_mask", "weight_offsets", "weight_layout"}
NEUTRAL_MODULES = {"interface", "registry", "storage", "version"}
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True)
class Module:
    """A parsed file: its dotted name within the package, text and syntax tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @cached_property
    def code_lines(self) -> set[int]:
        """Numbers of the lines that hold code, those of docstrings included."""
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NOT_CODE:
                lines.update(range(token.start[0], token.end[0] + 1))
        return lines

    def length(self, function: Function) -> int:
        """Count the lines of code of a function; see the top of this file."""
        lines = range(function.lineno, (function.end_lineno or 0) + 1)
        return len(self.code_lines.intersection(lines) - docstring_lines(function))

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Yield all functions and methods with a name for the report."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield f"{self.name}.{node.name}", node


def docstring_lines(function: Function) -> set[int]:
    """Return the numbers of the lines of a function's docstring."""
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None:
        return set()
    return set(range(first.lineno, (first.end_lineno or 0) + 1))


def parameters(function: Function) -> int:
    """Count the parameters of a function without `self` or `cls`."""
    arguments = function.args
    named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    variadic = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return len([a for a in named if a.arg not in {"self", "cls"}]) + len(variadic)


def fields(definition: ast.ClassDef) -> set[str]:
    """Return the fields of a class: annotated in its body or assigned on `self`."""
    declared = {
        node.target.id
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    }
    return declared | {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@dataclass(frozen=True)
class Tree:
    """All modules of a package, by their dotted name."""

    package: str
    modules: dict[str, Module]

    @classmethod
    def read(cls, checkout: Path, package: str) -> "Tree":
        """Parse the package of a checkout, which holds it in src/."""
        folder = checkout / "src" / package
        if not folder.is_dir():
            sys.exit(
                f"{folder} is no folder. Pass a checkout that holds src/{package}."
            )
        modules = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(p for p in parts if p != "__init__")
            text = path.read_text("utf-8")
            modules[name] = Module(name, path, text, ast.parse(text))
        return cls(package, modules)

    def imports(self, module: Module) -> Iterator[tuple[str, str]]:
        """Yield (imported module, bound name) of each import of the package."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                pairs = [(alias.name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = self._source(module, node)
                pairs = [self._bound(source, alias.name) for alias in node.names]
            else:
                continue
            yield from (pair for pair in pairs if pair[0] in self.modules)

    def _bound(self, source: str, name: str) -> tuple[str, str]:
        """Return what `from source import name` imports: a submodule, or a name."""
        inner = f"{source}.{name}"
        return (inner if inner in self.modules else source), name

    def _source(self, module: Module, node: ast.ImportFrom) -> str:
        """Return the absolute name of the module that a `from` names."""
        if not node.level:
            return node.module or ""
        is_package = module.path.name == "__init__.py"
        parts = module.name.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, node.module] if node.module else base)

    def imported(self, name: str) -> set[str]:
        """Return the modules of the package that a module imports."""
        return {source for source, _ in self.imports(self.modules[name])} - {name}

    def reached(self, name: str) -> set[str]:
        """Return the modules that imports lead to from a module, without itself."""
        found, waiting = {name}, [name]
        while waiting:
            new = self.imported(waiting.pop()) - found
            found |= new
            waiting.extend(new)
        return found - {name}

    def block_module(self) -> str:
        """Return the name of the module that prunes one block."""
        names = [f"{self.package}.{name}" for name in BLOCK_MODULES]
        return next(name for name in names if name in self.modules)

    def layout_files(self) -> list[str]:
        """Return the modules outside of formats/ that know one packed layout."""
        formats = f"{self.package}.formats"
        outside = [m for m in self.modules.values() if not is_within(m.name, formats)]
        return [m.name for m in outside if self._knows_layout(m)]

    def _knows_layout(self, module: Module) -> bool:
        formats = f"{self.package}.formats"
        exported = {
            name: source for source, name in self.imports(self.modules[formats])
        }
        for source, name in self.imports(module):
            home = exported.get(name, source) if source == formats else source
            inner = home.removeprefix(formats).removeprefix(".")
            if is_within(home, formats) and inner and inner not in NEUTRAL_MODULES:
                return True
        used = set(identifiers(module.tree))
        has_parts = (
            "parts" in used
            and not self._names_formats
            and not self._has_other_parts(module.path.parent)
        )
        return has_parts or not used.isdisjoint(LAYOUT_IDENTIFIERS)

    @cached_property
    def _names_formats(self) -> bool:
        """Whether the description of a tensor names its format."""
        return any(
            "format" in fields(node)
            for module in self.modules.values()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and node.name == "TensorInfo"
        )

    def _has_other_parts(self, folder: Path) -> bool:
        """Return whether a class of a folder, not TensorInfo, has a field `parts`."""
        return any(
            "parts" in fields(node)
            for module in self.modules.values()
            if module.path.parent == folder
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and node.name != "TensorInfo"
        )


def is_within(name: str, package: str) -> bool:
    """Return whether a module is a package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Yield attributes, annotated names, and strings that name a companion tensor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Constant) and node.value in LAYOUT_IDENTIFIERS:
            yield str(node.value)


def percentile(values: list[int], fraction: float) -> int:
    """Return the smallest value that this fraction of the values does not exceed."""
    return sorted(values)[math.ceil(fraction * len(values)) - 1]


def measure(tree: Tree) -> dict[str, str]:
    """Return the rows of the table for one tree."""
    functions = [
        (module.length(node), parameters(node), name)
        for module in tree.modules.values()
        for name, node in module.functions()
    ]
    classes = [
        (len(fields(node)), f"{module.name}.{node.name}")
        for module in tree.modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    ]
    lengths = [length for length, _, _ in functions]
    most_parameters = max((count, name) for _, count, name in functions)
    fan_out = max((len(tree.imported(name)), name) for name in tree.modules)
    block = tree.block_module()
    names = list(tree.imports(tree.modules[block]))
    layout_files = tree.layout_files()
    return {
        "modules": str(len(tree.modules)),
        "functions": str(len(functions)),
        "median function, lines": f"{statistics.median(lengths):g}",
        "90th percentile, lines": str(percentile(lengths, 0.9)),
        "longest function": _named(*max((n, name) for n, _, name in functions)),
        f"functions over {LONG} lines": str(sum(n > LONG for n in lengths)),
        "most parameters": _named(*most_parameters),
        "most fields of a class": _named(*max(classes)),
        "widest fan-out": _named(*fan_out),
        "the module of one block": block,
        "  names it imports": str(len(names)),
        "  modules it imports": str(len(tree.imported(block))),
        "  modules it reaches": str(len(tree.reached(block))),
        "files that know a packed layout": str(len(layout_files)),
    } | {f"  {i + 1}": name for i, name in enumerate(layout_files)}


def _named(count: int, name: str) -> str:
    return f"{count} ({name})"


def show(columns: list[tuple[str, dict[str, str]]]) -> None:
    """Print the tables of several trees side by side."""
    labels = list(dict.fromkeys(label for _, table in columns for label in table))
    rows = [["", *(title for title, _ in columns)]]
    rows += [[label, *(t.get(label, "-") for _, t in columns)] for label in labels]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def main() -> None:
    """Measure one checkout, or two side by side."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("tree", nargs="?", type=Path, default=here)
    parser.add_argument("--compare", type=Path, metavar="OTHER")
    parser.add_argument("--package", default="halve")
    options = parser.parse_args()
    checkouts = [options.tree, *([options.compare] if options.compare else [])]
    show([(str(c), measure(Tree.read(c, options.package))) for c in checkouts])


if __name__ == "__main__":
    main()
