"""Strings in the source of a module that is not imported."""

from __future__ import annotations

import ast
import string
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

_Node = TypeVar("_Node")


class Module:
    """A module's syntax tree.

    All methods raise ValueError, naming what was looked for, if it is not there or not as expected.

    Args:
        path: the source.

    Raises:
        OSError: it cannot be read.
        SyntaxError: it is no Python.
    """

    def __init__(self, path: Path) -> None:
        self._tree = ast.parse(path.read_text(encoding="utf-8"))

    def constant(self, name: str, *keys: str) -> str:
        """A constant of the module, or with keys a value of one that is a dictionary."""
        value = ast.literal_eval(_only(name, _assignments(self._tree.body, name)))
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"{name}: expected a dictionary with the key {key!r}")
            value = value[key]
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected a string, found {value!r}")
        return value

    def local(self, function: str, name: str) -> str:
        """The string that a function gives to a variable of its own."""
        values = _assignments(self._nodes(function), name)
        strings = [v for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
        return str(ast.literal_eval(_only(f"{name} in {function}", strings)))

    def f_strings(self, function: str, fields: tuple[int, ...]) -> list[str]:
        """A function's f-strings in the order of its lines.

        Args:
            function: its name.
            fields: how many fields each of them must have.

        Returns:
            Templates whose fields have no names.
        """
        nodes = [node for node in self._nodes(function) if isinstance(node, ast.JoinedStr)]
        nodes.sort(key=lambda node: (node.lineno, node.col_offset))
        found = [_template(node, lambda _: "{}") for node in nodes]
        if tuple(text.count("{}") for text in found) != fields:
            raise ValueError(f"{function}: expected f-strings with {fields} fields, found {found}")
        return found

    def choice(self, function: str, key: str, fields: Mapping[str, str]) -> tuple[str, str]:
        """The two f-strings between which a function chooses for a key of a dictionary.

        Args:
            function: its name.
            key: the key.
            fields: fields for the expressions in the f-strings.

        Returns:
            Templates for a condition that holds, and one that does not.
        """
        values = [
            value
            for node in self._nodes(function)
            if isinstance(node, ast.Dict)
            for name, value in zip(node.keys, node.values, strict=True)
            if isinstance(name, ast.Constant) and name.value == key
        ]

        def known(expression: str) -> str:
            if expression not in fields:
                raise ValueError(f"{key!r} in {function}: unknown field {expression!r}")
            return fields[expression]

        value = _only(f"{key!r} in {function}", values)
        if isinstance(value, ast.IfExp):
            body, other = value.body, value.orelse
            if isinstance(body, ast.JoinedStr) and isinstance(other, ast.JoinedStr):
                return _template(body, known), _template(other, known)
        raise ValueError(f"{key!r} in {function}: expected a choice between two f-strings")

    def replacements(self, function: str, name: str) -> list[tuple[str, str]]:
        """What a function replaces in a string by what, in the order of its lines."""
        calls = [
            node
            for node in self._nodes(function)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.replace"
        ]
        calls.sort(key=lambda node: node.lineno)
        found = [[ast.literal_eval(argument) for argument in call.args] for call in calls]
        if not found or not all(len(p) == 2 and all(isinstance(t, str) for t in p) for p in found):
            raise ValueError(f"{name} in {function}: expected replacements, found {found}")
        return [(old, new) for old, new in found]

    def _nodes(self, function: str) -> list[ast.AST]:
        found = [
            n for n in self._tree.body if isinstance(n, ast.FunctionDef) and n.name == function
        ]
        return [*ast.walk(_only(f"function {function}", found))]


def with_fields(template: str, fields: Mapping[str, str]) -> str:
    """A template with its fields replaced by others.

    Args:
        template: the template.
        fields: name to text with the new field.

    Raises:
        ValueError: it has a field of another name, or one with a format.
    """
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        parts.append(_literal(text))
        if name is not None:
            if form or conversion or name not in fields:
                raise ValueError(f"unknown field {name!r} in {template!r}")
            parts.append(fields[name])
    return "".join(parts)


def _only(what: str, found: list[_Node]) -> _Node:
    if len(found) != 1:
        raise ValueError(f"{what}: expected it once, found it {len(found)} times")
    return found[0]


def _assignments(nodes: Iterable[ast.AST], name: str) -> list[ast.expr]:
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]
    ]


def _template(node: ast.JoinedStr, field: Callable[[str], str]) -> str:
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            parts.append(field(ast.unparse(part.value)))
        else:
            parts.append(_literal(str(ast.literal_eval(part))))
    return "".join(parts)


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
