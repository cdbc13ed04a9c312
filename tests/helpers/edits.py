"""Small wrong edits of Python sources, made from the syntax tree, and a fixed choice of them.

An edit replaces one expression or statement: a comparison, an operator or a condition turned round,
a number that is another, a call dropped, two arguments swapped. Text that nothing computes with is
left alone: annotations, docstrings, messages of errors, decorators.

The choice goes by a hash of the edit itself, so that a change elsewhere does not draw others.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("opsdc", "opsdc_kernels")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
}  # fmt: skip
COMMUTATIVE = ("min", "max", "minimum", "maximum", "equal", "logaddexp", "add", "mul", "vecdot")
COUNTERPARTS = {"min": "max", "max": "min", "any": "all", "all": "any"}
TEXTS = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)
"""Nodes in which nothing is edited."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One wrong edit of a file."""

    file: str
    """Path from the root, with slashes."""
    line: int
    kind: str
    before: str
    after: str
    start: int
    """Place of `before` in the file, in bytes."""
    stop: int
    id: str
    """The same wherever in the file the edited function stands."""

    def applied(self, source: bytes) -> bytes:
        """The file with the edit."""
        assert source[self.start : self.stop].decode() == self.before, self
        return source[: self.start] + self.after.encode() + source[self.stop :]


def edits_of(root: Path, path: Path) -> list[Edit]:
    """Every edit of a file, in the order of its lines."""
    source, file = path.read_bytes(), path.relative_to(root).as_posix()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    edits, seen = [], Counter()
    for where, node, kind, after in _sites(ast.parse(source), ""):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        before = source[start:stop].decode()
        identity = (file, where, kind, before, after)
        seen[identity] += 1
        name = hashlib.sha256(repr((*identity, seen[identity])).encode()).hexdigest()[:16]
        edits.append(
            Edit(file=file, line=node.lineno, kind=kind, before=before, after=after, start=start,
                 stop=stop, id=name)
        )  # fmt: skip
    return edits


def fixed_choice(root: Path, count: int) -> list[Edit]:
    """About `count` edits, of each file as many as its share of all there are, at least one."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    by_file = [edits for path in paths if (edits := edits_of(root, path))]
    share = count / sum(map(len, by_file))
    chosen = []
    for edits in by_file:
        chosen += sorted(edits, key=lambda edit: edit.id)[: max(round(share * len(edits)), 1)]
    return sorted(chosen, key=lambda edit: edit.id)


def _sites(node: ast.AST, where: str) -> Iterator[tuple[str, ast.AST, str, str]]:
    """(function or class, node, kind, replacement) of everything below `node`."""
    if isinstance(node, TEXTS) or _is_docstring(node) or _is_for_type_checkers(node):
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        where = f"{where}.{node.name}"
    for kind, replacement in _replacements(node):
        yield where, node, kind, replacement
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        if field == "test" and isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield where, value, "condition negated", f"(not ({ast.unparse(value)}))"
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _sites(child, where)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _replacements(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(kind, text) of what may stand in a node's place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield "comparison", _with(node, ops=[COMPARISONS[type(node.ops[0])]()])
    elif isinstance(node, ast.BoolOp):
        turned = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and for or", _with(node, op=turned)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "operator dropped", f"({ast.unparse(node.operand)})"
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
        if not any(isinstance(side, ast.JoinedStr) or _is_text(side) for side in sides):
            yield "operator", _with(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield "constant", _other_number(node.value)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call dropped", "pass"
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)


def _other_calls(node: ast.Call) -> Iterator[tuple[str, str]]:
    if isinstance(node.func, ast.Name) and node.func.id in COUNTERPARTS:
        yield "counterpart", _with(node, func=ast.Name(COUNTERPARTS[node.func.id]))
    name = ast.unparse(node.func).rpartition(".")[2]
    swaps = len(node.args) > 1 and not any(isinstance(x, ast.Starred) for x in node.args[:2])
    if swaps and name not in COMMUTATIVE and ast.unparse(node.args[0]) != ast.unparse(node.args[1]):
        first, second, *rest = node.args
        yield "arguments swapped", _with(node, args=[second, first, *rest])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))


def _other_number(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    return repr(2 * value if value else 1.0)


def _with(node: ast.AST, **changed: object) -> str:
    """The source of a node with other fields, in brackets where it is an expression."""
    other = copy.copy(node)
    for field, value in changed.items():
        setattr(other, field, value)
    text = ast.unparse(other)
    return f"({text})" if isinstance(node, (ast.Compare, ast.BoolOp, ast.BinOp)) else text
