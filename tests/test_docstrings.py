"""What docstrings name is there: arguments, fields and errors."""

import ast
import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import modtrain

PACKAGE = Path(modtrain.__file__).parent
# ``name: what it is``, at the start of a line or after a sentence.
_DESCRIBED = re.compile(r"(?:^ *|[.)] )((?:[a-z]\w*, )*[a-z]\w*): ", re.M)
# Values that a field may have, which are described alike.
_VALUES = {"null", "empty"}
_RAISED = re.compile(r"^ +([A-Z]\w+): ", re.M)
Scope = ast.FunctionDef | ast.ClassDef


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE.parent), ast.parse(path.read_text())


def scopes(tree: ast.Module) -> Iterator[tuple[Scope, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Scope) and (text := ast.get_docstring(node, clean=False)):
            yield node, text


def names_in(node: Scope) -> set[str]:
    """The arguments of a function; of a class, its fields, attributes and methods' arguments."""
    names = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    if isinstance(node, ast.ClassDef):
        names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names


def unknown_arguments(tree: ast.Module) -> list[str]:
    return [
        f"{node.lineno}: {node.name} has no {name}"
        for node, text in scopes(tree)
        for names in _DESCRIBED.findall(text.partition("Raises:")[0])
        for name in names.split(", ")
        if name not in names_in(node) | _VALUES
    ]


def raised(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node, text in scopes(tree):
        for name in _RAISED.findall(text.partition("Raises:")[2]):
            yield node.lineno, name


def test_described_arguments_exist():
    problems = [
        f"{path}:{problem}" for path, tree in trees() for problem in unknown_arguments(tree)
    ]
    assert not problems, "\n".join(problems)


def test_documented_errors_exist():
    known = set(vars(builtins))
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                known.add(node.name)
            if isinstance(node, ast.ImportFrom):
                known |= {alias.name for alias in node.names}
    problems = [
        f"{path}:{line}: {name}"
        for path, tree in trees()
        for line, name in raised(tree)
        if name not in known
    ]
    assert not problems, "\n".join(problems)
