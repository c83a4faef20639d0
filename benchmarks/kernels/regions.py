"""Loops and conditions of the source, by line: what a machine instruction's place says about how often it runs."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton

LIBRARY = Path(triton.__file__).parent
LOOP, THEN, ELSE = "loop", "then", "else"


@dataclass(frozen=True)
class Region:
    """The body of a loop, or one side of an ``if``; what follows an ``if`` that returns counts as its other side.

    line: Of the loop or condition.
    text: "function: for i in range(n)", "function: if a < b" (for both sides of it).
    static: Decided by the compiler, so that no trace of it is left in the machine code.
    returns: The condition makes the function return at once.
    """

    file: str
    line: int
    kind: str
    text: str
    static: bool
    returns: bool


@dataclass(frozen=True)
class Place:
    """Function that a line belongs to ("" outside), and the regions around it, outermost first."""

    function: str
    regions: tuple[Region, ...]


NOWHERE = Place("", ())


def place_of(file: str, line: int) -> Place:
    """Function and regions of a source line; lines of Triton's own library have a function, but no regions."""
    found = _places(file).get(line, NOWHERE)
    return Place(found.function, ()) if Path(file).is_relative_to(LIBRARY) else found


@cache
def _places(file: str) -> dict[int, Place]:
    try:
        tree = ast.parse(Path(file).read_text())
    except (OSError, SyntaxError):
        return {}
    places: dict[int, Place] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            _Walk(file, node, places).body(node.body, ())
            for line in range(node.lineno, node.body[0].lineno):
                places.setdefault(line, Place(node.name, ()))
    return places


class _Walk:
    """One function's lines."""

    def __init__(self, file: str, function: ast.FunctionDef, places: dict[int, Place]) -> None:
        self.file, self.function, self.places = file, function.name, places
        self.constants = _constants(function)

    def body(self, statements: list[ast.stmt], around: tuple[Region, ...]) -> None:
        for node in statements:
            self._mark(node, around)
            if isinstance(node, ast.For | ast.While):
                inside = (*around, self._region(node, LOOP))
                # The step and the test of a loop run in it, its first value does not; both stand in its first line.
                self._mark(node, inside)
                self.body(node.body, inside)
            elif isinstance(node, ast.If):
                self.body(node.body, (*around, self._region(node, THEN)))
                self.body(node.orelse, (*around, self._region(node, ELSE)))
                if isinstance(node.body[-1], ast.Return):
                    around = (*around, self._region(node, ELSE))
            elif isinstance(node, ast.With):
                self.body(node.body, around)

    def _mark(self, node: ast.stmt, around: tuple[Region, ...]) -> None:
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            self.places[line] = Place(self.function, around)

    def _region(self, node: ast.For | ast.While | ast.If, kind: str) -> Region:
        if isinstance(node, ast.For):
            header = f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}"
            static = "static_range" in header
        else:
            header = f"{'while' if kind == LOOP else 'if'} {ast.unparse(node.test)}"
            static = kind != LOOP and _is_static(node.test, self.constants)
        returns = kind != LOOP and isinstance(node.body[0], ast.Return)
        return Region(self.file, node.lineno, kind, f"{self.function}: {header}", static, returns)


def _constants(function: ast.FunctionDef) -> set[str]:
    """Names that are constants of the compiler inside a function."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    found = {argument.arg for argument in arguments if "constexpr" in ast.dump(argument)}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and "constexpr" in ast.dump(node.annotation):
            found.add(ast.unparse(node.target))
    return found


def _is_static(node: ast.expr, constants: set[str]) -> bool:
    """Whether an expression is made of constants, comparisons with None and types only; capitals mark a constant."""
    if isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return True
    if isinstance(node, ast.Name):
        return node.id in constants or node.id.isupper() or node.id in ("tl", "len", "float", "hasattr")
    if isinstance(node, ast.Attribute):
        return node.attr.isupper() or node.attr in ("dtype", "type", "shape") or _is_static(node.value, constants)
    if isinstance(node, ast.Constant):
        return True
    children = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return bool(children) and all(_is_static(child, constants) for child in children)
