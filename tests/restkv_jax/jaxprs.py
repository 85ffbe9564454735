"""What a traced program makes on its way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every intermediate, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    yield from sizes(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from sizes(inner)
