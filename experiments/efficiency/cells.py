"""One measurement: a length, a batch, a policy and a budget; what it needs, and whether it fits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.core.errors import UserError
from experiments.core.options import PolicyText, Slots
from experiments.core.plans import make_plan
from experiments.efficiency.subject import Subject
from restkv_jax.decode import CachePlan, KVCache, decode_chunk, init_decode, prefill, row_keys

# Decode steps of one timed call: enough that starting it does not count.
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        length: T, tokens of each prompt.
        batch: B, prompts.
        policy: as the user wrote it.
        budget: slots a head, None for a policy that keeps everything or states its own.
    """

    length: int
    batch: int
    policy: PolicyText
    budget: int | None

    @property
    def key(self) -> str:
        """Unique among the cells of a run."""
        return f"{self.length}x{self.batch}/{self.name}"

    @property
    def name(self) -> str:
        """Policy and budget."""
        return self.policy.label if self.budget is None else f"{self.policy.label} {self.budget}"

    def plan(self, tokens: int) -> CachePlan:
        """The cache plan, with room for so many tokens.

        Raises:
            UserError: the policy or its budget is impossible.
        """
        plan = make_plan(self.policy, Slots(self.budget or 1), headroom=tokens)
        if plan.prompt_slots(self.length) > self.length:
            raise UserError(
                f"--budget {self.budget}: more slots than the prompt's {self.length} tokens"
            )
        return plan


def make_cells(
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    policies: tuple[PolicyText, ...],
    budgets: tuple[int, ...],
) -> tuple[Cell, ...]:
    """All combinations; at each length and batch those that keep least come first."""
    cells = []
    for length in lengths:
        for batch in batches:
            for policy in policies:
                fixed = policy.name == "full" or any(key == "budget" for key, _ in policy.options)
                own: tuple[int | None, ...] = (None,) if fixed else budgets
                cells += [Cell(length, batch, policy, budget) for budget in own]
    # The memory that a process has ever used then tells of the cell that was measured last.
    return tuple(
        sorted(cells, key=lambda c: (c.length * c.batch, c.length, c.policy.name == "full"))
    )


class Programs(NamedTuple):
    """The compiled programs of a cell, and the bytes that each has alive at most."""

    prefill: jax.stages.Compiled
    decode: jax.stages.Compiled
    prefill_bytes: int
    decode_bytes: int


class DoesNotFit(Exception):
    """The cell would need more memory than there is; says how much."""


def abstract_prompt(cell: Cell) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Tokens and their mask, as shapes."""
    shape = (cell.batch, cell.length)
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)


def abstract_cache(subject: Subject, cell: Cell, plan: CachePlan) -> KVCache:
    """The cell's cache as shapes.

    Raises:
        UserError: the plan does not suit the network.
    """
    try:
        _, (cache,) = jax.eval_shape(
            functools.partial(prefill, plans=(plan,)), subject.abstract, *abstract_prompt(cell)
        )
    except ValueError as error:
        raise UserError(f"--policy {cell.name}: {error}") from None
    return cache


def compile_cell(subject: Subject, cell: Cell, plan: CachePlan, available: int | None) -> Programs:
    """Compiles the cell's programs from shapes; no array is made.

    Args:
        subject: the network.
        cell: what is measured.
        plan: of the cell.
        available: bytes of memory, None if unknown.

    Raises:
        DoesNotFit: by weights and cache alone, or by what a compiled program needs.
        UserError: the plan does not suit the network.
    """
    model, prompt = subject.abstract, abstract_prompt(cell)
    cache = abstract_cache(subject, cell, plan)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    _require(weights + cache.total_bytes, available, "weights and cache alone")
    first = prefill.lower(model, *prompt, plans=(plan,)).compile()
    prefill_bytes = program_bytes(first)
    _require(prefill_bytes, available, "the compiled prefill")

    def begin(logits: jax.Array, cache: KVCache) -> Any:
        return init_decode(logits, cache, *decode_arguments(cell.batch))

    logits = jax.ShapeDtypeStruct((cell.batch, subject.config.vocab_size), jnp.float32)
    state = jax.eval_shape(begin, logits, cache)
    never = jax.ShapeDtypeStruct((1,), jnp.int32)
    decode = decode_chunk.lower(model, state, never, steps=CHUNK).compile()
    decode_bytes = program_bytes(decode)
    _require(decode_bytes, available, "the compiled decoding")
    return Programs(first, decode, prefill_bytes, decode_bytes)


def decode_arguments(batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, limits that are never reached, and stop tokens that never come."""
    return row_keys(0, batch), jnp.full(batch, 2**30, jnp.int32), jnp.asarray([-1])


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a program has alive at most: arguments, results and what is in between."""
    memory: Any = program.memory_analysis()
    found = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(found + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


def _require(needed: int, available: int | None, what: str) -> None:
    if available is not None and needed > available:
        raise DoesNotFit(
            f"{what}: {needed / 1e9:.2f} GB do not fit into {available / 1e9:.2f} GB of memory"
        )
