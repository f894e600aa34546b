"""Mutants of a Python source: copies with one small fault each, as a reviewer might make it.

Pure: text in, mutants out. `mutation.py` runs them.
"""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

_COMPARISONS: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
_OPERATORS: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
_OPPOSITES: Final = {"all": "any", "any": "all", "min": "max", "max": "min"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A source with one fault.

    Attributes:
        kind: what was done, such as `comparison`.
        line, end_line: the lines of the statement that holds the fault (of a compound one: of the
            part before its body), counted from 1.
        text: the whole mutated source.
        diff: the changed lines, as `-` and `+` lines.
    """

    kind: str
    line: int
    end_line: int
    text: str
    diff: str


@dataclass(frozen=True, slots=True)
class _Fault:
    kind: str
    node: ast.AST
    replacement: str


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a source that compiles, in the order of the text.

    Left as they are: annotations, decorators, `__all__`, texts, what `raise` and `assert` say (a
    mutant there changes wording), and imports for type checkers.

    Raises:
        SyntaxError: the source is no Python.
    """
    lines = source.splitlines(keepends=True)
    found: dict[str, Mutant] = {}
    for statement in _statements(ast.parse(source)):
        first, last = statement.lineno, _header_end(statement)
        for fault in _faults(statement):
            text = _replaced(lines, fault)
            if text == source or text in found or not _compiles(text):
                continue
            diff = "".join(
                line if line.endswith("\n") else f"{line}\n"
                for line in difflib.unified_diff(lines, text.splitlines(keepends=True), n=0)
                if not line.startswith(("---", "+++", "@@"))
            )
            found[text] = Mutant(fault.kind, first, last, text, diff)
    return list(found.values())


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from _statements(other)
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from _statements(node)


def _header_end(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    end = statement.end_lineno or statement.lineno
    return max(statement.lineno, body[0].lineno - 1) if isinstance(body, list) and body else end


def _faults(statement: ast.stmt) -> Iterator[_Fault]:
    if isinstance(statement, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
        return
    yield from _statement_faults(statement)
    for node in _expressions(statement):
        for make in _EXPRESSION_FAULTS:
            yield from make(node)


def _statement_faults(statement: ast.stmt) -> Iterator[_Fault]:
    match statement:
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield _Fault("removed statement", statement, "pass")
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield _Fault("removed statement", statement, "pass")
        case ast.Break():
            yield _Fault("break", statement, "continue")
        case ast.Continue():
            yield _Fault("continue", statement, "break")
        case ast.Return(value=ast.Constant(value=None | False)):
            pass  # None reads the same
        case ast.Return(value=ast.expr()):
            yield _Fault("return of a default", statement, "return None")
        case ast.If(test=test) | ast.While(test=test) if not _negates_itself(test):
            yield _Fault("negated condition", test, f"not ({_text(test)})")
        case ast.For():
            yield _Fault("first of several", statement.iter, f"list({_text(statement.iter)})[:1]")
    if isinstance(statement, ast.AugAssign) and type(statement.op) in _OPERATORS:
        other = copy.copy(statement)
        other.op = _OPERATORS[type(statement.op)]()
        yield _Fault("arithmetic", statement, ast.unparse(other))


def _negates_itself(test: ast.expr) -> bool:
    """Whether a mutant of the expression itself is already the condition's opposite."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return True
    return isinstance(test, ast.Compare) and len(test.ops) == 1


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a statement, less those of statements in it and of what is left alone."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            # positions inside of an f-string are not those of the file before Python 3.12
            if not isinstance(child, ast.AST) or isinstance(child, ast.stmt | ast.JoinedStr):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


def _comparison(node: ast.expr) -> Iterator[_Fault]:
    if not isinstance(node, ast.Compare):
        return
    for place, operator in enumerate(node.ops):
        for other in _COMPARISONS[type(operator)]:
            changed = copy.copy(node)
            changed.ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
            yield _Fault("comparison", node, f"({_text(changed)})")


def _arithmetic(node: ast.expr) -> Iterator[_Fault]:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        changed = copy.copy(node)
        changed.op = _OPERATORS[type(node.op)]()
        yield _Fault("arithmetic", node, f"({_text(changed)})")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield _Fault("arithmetic", node, f"({_text(node.operand)})")


def _constant(node: ast.expr) -> Iterator[_Fault]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield _Fault("constant", node, repr(not node.value))
    elif isinstance(node.value, int | float):
        yield _Fault("constant", node, f"{node.value + 1!r}")
        yield _Fault("constant", node, f"({node.value - 1!r})")


def _boolean(node: ast.expr) -> Iterator[_Fault]:
    match node:
        case ast.BoolOp(op=operator, values=values):
            changed = ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            yield _Fault("and, or", node, f"({_text(changed)})")
        case ast.IfExp(test=test) if not _negates_itself(test):
            yield _Fault("negated condition", test, f"(not ({_text(test)}))")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield _Fault("negated condition", node, f"({_text(operand)})")


def _call(node: ast.expr) -> Iterator[_Fault]:
    if not isinstance(node, ast.Call):
        return
    symmetric = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
    starred = any(isinstance(one, ast.Starred) for one in node.args[:2])
    if len(node.args) > 1 and not starred and not symmetric:
        changed = copy.copy(node)
        changed.args = [node.args[1], node.args[0], *node.args[2:]]
        yield _Fault("swapped arguments", node, _text(changed))
    if isinstance(node.func, ast.Name) and node.func.id in _OPPOSITES:
        yield _Fault("opposite", node.func, _OPPOSITES[node.func.id])


def _several(node: ast.expr) -> Iterator[_Fault]:
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        for part in node.generators:
            yield _Fault("first of several", part.iter, f"list({_text(part.iter)})[:1]")


_EXPRESSION_FAULTS: Final[tuple[Callable[[ast.expr], Iterator[_Fault]], ...]] = (
    _comparison, _arithmetic, _constant, _boolean, _call, _several,
)  # fmt: skip


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _replaced(lines: list[str], fault: _Fault) -> str:
    """The source with the node's own characters replaced; columns of `ast` count UTF-8 bytes."""
    node = fault.node
    assert isinstance(node, ast.expr | ast.stmt)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
    head, tail = lines[: node.lineno - 1], lines[node.end_lineno :]
    return "".join([*head, before, fault.replacement, after, *tail])


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return False
    return True
