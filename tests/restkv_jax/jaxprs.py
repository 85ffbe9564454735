"""What a traced program makes on its way."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of inner programs included, once for each place they are called at.

    Of a choice by platform what runs on CPU is looked at.
    """
    for equation in jaxpr.eqns:
        yield equation
        params = dict(equation.params)
        platforms = params.pop("branches_platforms", None)
        if platforms is not None:
            on_cpu = [platform is not None and "cpu" in platform for platform in platforms]
            chosen = on_cpu.index(True) if True in on_cpu else platforms.index(None)
            params["branches"] = params["branches"][chosen]
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


def sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every intermediate."""
    for equation in equations(jaxpr):
        yield from (out.aval.size for out in equation.outvars)


def counts(jaxpr: Any) -> collections.Counter[str]:
    """How often each primitive occurs."""
    return collections.Counter(equation.primitive.name for equation in equations(jaxpr))
