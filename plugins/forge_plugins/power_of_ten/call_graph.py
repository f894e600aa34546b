"""Who calls whom, as far as names tell, and the rings in it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from forge_plugins.power_of_ten.source import Function, Module, own_nodes

Node = tuple[str, str]
"""Module and qualified function."""


class CallGraph:
    """Calls between the functions of some modules.

    A call is resolved through names of the module, imports, `self.` and `cls.` within the class;
    what is called through a value (a callback, a hook) is not seen.
    """

    def __init__(self, modules: Sequence[Module]) -> None:
        self._by_name = {module.name: module for module in modules}
        self.calls: dict[Node, set[Node]] = {
            (module.name, name): set() for module in modules for name in module.functions
        }
        self.annotations: dict[Node, bool] = {}  # whether it answers yes or no
        for module in modules:
            for name, function in module.functions.items():
                self.annotations[module.name, name] = _gives(function)
                self.calls[module.name, name] = self._called(module, name, function)

    def _called(self, module: Module, name: str, function: Function) -> set[Node]:
        calls = [node for node in own_nodes(function) if isinstance(node, ast.Call)]
        result = {self.resolve(module, name, call.func) for call in calls}
        return {node for node in result if node is not None}

    def resolve(self, module: Module, caller: str, called: ast.expr) -> Node | None:
        """The function that a call means, or None when it is not one of these."""
        owner = caller.rpartition(".")[0]
        if isinstance(called, ast.Name):
            for prefix in (f"{caller}.", f"{owner}." if owner in module.functions else "", ""):
                if f"{prefix}{called.id}" in module.functions:
                    return module.name, f"{prefix}{called.id}"
            return self._elsewhere(module.imports.get(called.id, ""))
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            base = called.value.id
            if base in ("self", "cls"):
                method = f"{owner}.{called.attr}"
                return (module.name, method) if method in module.functions else None
            if base in module.classes and f"{base}.{called.attr}" in module.functions:
                return module.name, f"{base}.{called.attr}"
            return self._elsewhere(f"{module.imports.get(base, '')}.{called.attr}")
        return None

    def _elsewhere(self, dotted: str) -> Node | None:
        head, _, last = dotted.rpartition(".")
        result = self._by_name.get(head)
        return (head, last) if result is not None and last in result.functions else None

    def rings(self) -> list[list[Node]]:
        """Functions that reach themselves: strongly connected parts (Tarjan 1972), no recursion."""
        index: dict[Node, int] = {}
        low: dict[Node, int] = {}
        stack: list[Node] = []
        rings: list[list[Node]] = []
        for root in self.calls:
            if root in index:
                continue
            work = [(root, iter(sorted(self.calls[root])))]
            index[root] = low[root] = len(index)
            stack.append(root)
            while work:
                node, following = work[-1]
                child = next(following, None)
                if child is None:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[node])
                    if low[node] == index[node]:
                        rings += _ring(self.calls, stack, node)
                elif child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    work.append((child, iter(sorted(self.calls[child]))))
                elif child in stack:
                    low[node] = min(low[node], index[child])
        return rings


def _gives(function: Function) -> bool:
    """Whether the function answers yes or no: the answer of who may have failed."""
    return function.returns is not None and ast.unparse(function.returns) == "bool"


def _ring(calls: Mapping[Node, set[Node]], stack: list[Node], root: Node) -> list[list[Node]]:
    """Take a finished part off the stack: a ring if it has several members or calls itself."""
    at = stack.index(root)
    members = stack[at:]
    del stack[at:]
    return [members] if len(members) > 1 or root in calls[root] else []
