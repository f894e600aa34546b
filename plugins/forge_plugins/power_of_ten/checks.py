"""One function for each rule; each yields its findings in one module."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from forge_plugins.power_of_ten.call_graph import CallGraph
from forge_plugins.power_of_ten.finding import Finding
from forge_plugins.power_of_ten.source import Function, Module, own_nodes

MAX_LINES: Final = 60
MAX_NESTING: Final = 4
LONG: Final = 45
"""Lines from which a public function must check something."""

_ENDLESS: Final = frozenset({"itertools.count", "itertools.cycle"})
_DYNAMIC: Final = frozenset({"eval", "exec", "__import__"})
_MUTABLE: Final = frozenset({"list", "dict", "set", "bytearray", "defaultdict", "deque"})
_BLOCKS: Final = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)

Place = tuple[str, ast.AST]


def _places(module: Module) -> Iterator[Place]:
    """The module itself and each of its functions."""
    yield "", module.tree
    yield from module.functions.items()


def _at(module: Module, node: ast.AST, rule: int, function: str, message: str) -> Finding:
    return Finding(module.file, getattr(node, "lineno", 1), rule, function, message)


def recursion(modules: Sequence[Module], graph: CallGraph) -> Iterator[Finding]:
    """Rule 1."""
    by_name = {module.name: module for module in modules}
    for ring in graph.rings():
        ordered = sorted(ring)
        name, function = ordered[0]
        shown = " -> ".join(f"{each[1]}" for each in ordered)
        message = f"calls itself: {shown}" if len(ring) == 1 else f"a ring of calls: {shown}"
        yield _at(by_name[name], by_name[name].functions[function], 1, function, message)


def loops(module: Module) -> Iterator[Finding]:
    """Rule 2: a loop on a constant, over an endless iterator, or on what its body never changes."""
    for name, place in _places(module):
        for node in own_nodes(place):
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Call):
                called = _dotted(module, node.iter.func)
                if called in _ENDLESS:
                    yield _at(module, node, 2, name, f"a loop over {called}() has no bound")
            elif isinstance(node, ast.While):
                if isinstance(node.test, ast.Constant) and node.test.value:
                    yield _at(module, node, 2, name, "`while True` has no bound: count")
                elif not _can_change(node):
                    yield _at(module, node, 2, name, "the body never changes the condition")


def _can_change(loop: ast.While) -> bool:
    """Whether the condition can come out otherwise: it calls, or the body touches its names."""
    if any(
        isinstance(node, ast.Call | ast.NamedExpr | ast.Attribute) for node in ast.walk(loop.test)
    ):
        return True
    read = {node.id for node in ast.walk(loop.test) if isinstance(node, ast.Name)}
    for statement in loop.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Break | ast.Return | ast.Raise):
                return True
            if isinstance(node, ast.Name) and node.id in read:
                return True
    return False


def length(module: Module) -> Iterator[Finding]:
    """Rule 4."""
    for name, function in module.functions.items():
        lines = _body_lines(function)
        if lines > MAX_LINES:
            yield _at(module, function, 4, name, f"{lines} lines, at most {MAX_LINES}")
        depth = _nesting(function)
        if depth > MAX_NESTING:
            yield _at(module, function, 4, name, f"{depth} levels of blocks, at most {MAX_NESTING}")


def _body_lines(function: Function) -> int:
    """Lines from the `def` to the end, without decorators and docstring."""
    last = function.end_lineno or function.lineno
    lines = last - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def _nesting(function: Function) -> int:
    deepest = 0
    todo: list[tuple[int, ast.AST]] = [(0, node) for node in function.body]
    while todo:
        depth, node = todo.pop()
        if isinstance(node, Function | ast.ClassDef):
            continue
        here = depth + isinstance(node, _BLOCKS)
        deepest = max(deepest, here)
        for child in ast.iter_child_nodes(node):
            chained = (
                isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
            )
            todo.append((depth if chained else here, child))  # elif is no deeper than its if
    return deepest


def contracts(module: Module) -> Iterator[Finding]:
    """Rule 5."""
    for name, function in module.functions.items():
        parts = name.split(".")
        given = [each.arg for each in function.args.args if each.arg not in ("self", "cls")]
        if any(part.startswith("_") for part in parts) or not given:
            continue
        if _body_lines(function) <= LONG:
            continue
        if not any(isinstance(node, ast.Raise | ast.Assert) for node in own_nodes(function)):
            message = f"{_body_lines(function)} lines without a check of {', '.join(given)}"
            yield _at(module, function, 5, name, message)


def scope(module: Module) -> Iterator[Finding]:
    """Rule 6."""
    for name, place in _places(module):
        for node in own_nodes(place):
            if isinstance(node, ast.Global):
                yield _at(module, node, 6, name, f"global {', '.join(node.names)}")
    for node in module.tree.body:
        target, value, annotation = _assignment(node)
        if target is None or not _is_mutable(value) or target.startswith("__"):
            continue
        is_final = annotation is not None and "Final" in ast.unparse(annotation)
        if not is_final and not target.isupper():
            yield _at(module, node, 6, "", f"{target} can change: make it Final, or a tuple")


def _assignment(node: ast.stmt) -> tuple[str | None, ast.expr | None, ast.expr | None]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id, node.value, node.annotation
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id, node.value, None
    return None, None, None


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    called = value.func if isinstance(value, ast.Call) else None
    return isinstance(called, ast.Name) and called.id in _MUTABLE


def results(module: Module, graph: CallGraph) -> Iterator[Finding]:
    """Rule 7."""
    for name, place in _places(module):
        for node in own_nodes(place):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                target = graph.resolve(module, name, node.value.func)
                if target is not None and graph.annotations.get(target):
                    yield _at(module, node, 7, name, f"the result of {target[1]} is dropped")
            elif isinstance(node, ast.ExceptHandler):
                yield from _handler(module, name, node)


def _handler(module: Module, name: str, node: ast.ExceptHandler) -> Iterator[Finding]:
    if node.type is None:
        yield _at(module, node, 7, name, "`except:` takes in everything")
    broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    empty = all(
        isinstance(each, ast.Pass | ast.Continue)
        or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in node.body
    )
    if broad and empty:
        yield _at(module, node, 7, name, "an exception of any kind is swallowed")
    todo: list[ast.AST] = list(node.body)
    while todo:
        inner = todo.pop()
        if isinstance(inner, Function | ast.ClassDef | ast.ExceptHandler | ast.Lambda):
            continue
        if isinstance(inner, ast.Raise) and inner.exc is not None and inner.cause is None:
            same = isinstance(inner.exc, ast.Name) and inner.exc.id == node.name
            if not same:
                yield _at(module, inner, 7, name, "raised without its cause: write `from error`")
        todo.extend(ast.iter_child_nodes(inner))


def dynamic(module: Module) -> Iterator[Finding]:
    """Rule 8."""
    for name, place in _places(module):
        for node in own_nodes(place):
            if isinstance(node, ast.Assign):
                yield from _patches(module, name, node)
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id in _DYNAMIC:
                yield _at(module, node, 8, name, f"{called.id}() runs text as code")
    for name, result in module.classes.items():
        if any(keyword.arg == "metaclass" for keyword in result.keywords):
            yield _at(module, result, 8, name, "a metaclass")


def _patches(module: Module, name: str, node: ast.Assign) -> Iterator[Finding]:
    """Assignments to what was imported."""
    for target in node.targets:
        if not isinstance(target, ast.Attribute) or not isinstance(target.value, ast.Name):
            continue
        base = target.value.id
        if base in module.imports:
            yield _at(module, node, 8, name, f"{base}.{target.attr} is patched")


def defaults(module: Module) -> Iterator[Finding]:
    """Rule 9."""
    for name, function in module.functions.items():
        given = [*function.args.defaults, *(d for d in function.args.kw_defaults if d is not None)]
        for default in given:
            if _is_mutable(default):
                yield _at(module, default, 9, name, f"the default {ast.unparse(default)} is shared")


_SILENCED: Final = (
    (re.compile(r"#\s*type:\s*ignore(?!\[)"), "`type: ignore` without a code"),
    (re.compile(r"#\s*noqa(?!:)", re.IGNORECASE), "`noqa` without a code"),
)


def warnings(module: Module) -> Iterator[Finding]:
    """Rule 10."""
    for line, comment in module.comments():
        for pattern, message in _SILENCED:
            if pattern.search(comment):
                yield Finding(module.file, line, 10, "", message)
    for name, place in _places(module):
        for node in own_nodes(place):
            if not isinstance(node, ast.Call):
                continue
            called = _dotted(module, node.func)
            ignores = any(
                isinstance(each, ast.Constant) and each.value == "ignore" for each in node.args
            )
            narrow = len(node.args) + len(node.keywords) > 1
            silences = called in ("warnings.simplefilter", "warnings.filterwarnings")
            if silences and ignores and not narrow:
                yield _at(module, node, 10, name, "every warning is silenced")


def _dotted(module: Module, called: ast.expr) -> str:
    if isinstance(called, ast.Name):
        return module.imports.get(called.id, called.id)
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
        return f"{module.imports.get(called.value.id, called.value.id)}.{called.attr}"
    return ""


IN_ONE_MODULE: Final[tuple[Callable[[Module], Iterator[Finding]], ...]] = (
    loops, length, contracts, scope, dynamic, defaults, warnings,
)  # fmt: skip


def check_all(modules: Sequence[Module]) -> list[Finding]:
    """All findings, by file and line."""
    graph = CallGraph(modules)
    result = list(recursion(modules, graph))
    for module in modules:
        result += results(module, graph)
        for check in IN_ONE_MODULE:
            result += check(module)
    return sorted(set(result))
