"""No module of rcm needs, over any detour, a module that needs it: what two modules share stands
below both.

Imports inside functions count, since they only hide a circle; those under `if TYPE_CHECKING` do
not, since they never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.hygiene.source import files, name, tree


def imports_that_run(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    annotations = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in node.orelse if annotations else ast.iter_child_nodes(node):
        yield from imports_that_run(child)


def needed(module: ast.Module, *, package: str, known: set[str]) -> set[str]:
    """Modules among `known` that `module`, which lies in `package`, imports: of `from a import b`
    the module a.b, or else a.
    """
    found = set()
    for node in imports_that_run(module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        found |= {inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found & known


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle in the order of their imports, the first again at the end; [] if
    there is none.
    """
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := search(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def dotted(path: Path) -> tuple[str, str]:
    """(module, package it lies in) of a file."""
    parts = name(path).removesuffix(".py").split("/")
    return (".".join(parts[:-1]),) * 2 if parts[-1] == "__init__" else (".".join(parts), ".".join(parts[:-1]))


def test_no_import_circle_in_rcm() -> None:
    places = {dotted(path): path for path in files("rcm")}
    known = {module for module, _ in places}
    graph = {module: needed(tree(path), package=package, known=known) - {module} for (module, package), path in places.items()}
    assert sum(map(len, graph.values())) > len(graph), "hardly an import found: the rule would pass on nothing"
    assert not (found := circle(graph)), " -> ".join(found)


def test_the_rule_sees_a_circle_through_a_function_and_not_one_of_annotations() -> None:
    sources = {
        "p.a": "import p.b",
        "p.b": "def f():\n    from . import c",
        "p.c": "if TYPE_CHECKING:\n    from p.a import A\nelse:\n    import os",
    }

    def graph() -> dict[str, set[str]]:
        return {module: needed(ast.parse(text), package="p", known=set(sources)) for module, text in sources.items()}

    assert circle(graph()) == []
    sources["p.c"] += "\n    from p.a import A"
    assert circle(graph()) == ["p.a", "p.b", "p.c", "p.a"]
