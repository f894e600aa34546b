"""Python files as trees, with their functions and what they import."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Module:
    """One file."""

    file: str  # as findings name it
    name: str  # dotted
    tree: ast.Module
    text: str
    functions: dict[str, Function] = field(default_factory=dict)  # by qualified name
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)  # local name -> dotted name

    def comments(self) -> Iterator[tuple[int, str]]:
        """Line and text of every comment."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def python_files(paths: Iterable[Path]) -> list[Path]:
    """The files below the paths, hidden folders and virtual environments left out.

    Raises:
        FileNotFoundError: a path that is not there.
    """
    result: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(path)
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            inside = file.relative_to(path).parts if path.is_dir() else ()
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside)
            if not hidden and file.suffix == ".py":
                result.setdefault(file, None)
    return list(result)


def module_name(file: Path) -> str:
    """The dotted name, from the folders that are packages."""
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.resolve().parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts) or file.stem


def read_module(file: Path) -> Module:
    """Parse a file.

    Raises:
        SyntaxError, UnicodeDecodeError: it is no Python.
    """
    text = file.read_text(encoding="utf-8")
    module = Module(str(file), module_name(file), ast.parse(text, str(file)), text)
    todo: list[tuple[str, ast.AST]] = [("", module.tree)]
    while todo:
        prefix, node = todo.pop()
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, Function):
                inner = f"{prefix}{child.name}"
                module.functions.setdefault(inner, child)
                inner += "."
            elif isinstance(child, ast.ClassDef):
                inner = f"{prefix}{child.name}"
                module.classes[inner] = child
                inner += "."
            _note_imports(module, child)
            todo.append((inner, child))
    return module


def _note_imports(module: Module, node: ast.AST) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            module.imports[local] = alias.name if alias.asname else local
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            module.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module without those of functions and classes inside it."""
    todo = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, Function | ast.ClassDef):
            continue
        yield node
        todo.extend(ast.iter_child_nodes(node))
