"""From the policies that the user wrote to cache plans."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from experiments.core.errors import UserError
from experiments.core.options import Budget, PolicyText, parse_budget
from restkv_jax.decode import POLICIES, AdaKV, CachePlan, HeadAllocation, Policy, SharedBudget
from restkv_jax.policies import PRESETS

ALLOCATIONS: dict[str, type[HeadAllocation]] = {
    allocation.name: allocation for allocation in (AdaKV, SharedBudget)
}

# What is written behind a policy's name, but belongs to the cache and not to the policy.
PLAN_OPTIONS: dict[str, type] = {
    "budget": str,
    "layers": str,
    "heads": str,
    "lists": int,
    "decode_budget": int,
    "evict_every": int,
    "rope": str,
    "storage": str,
}


def make_policy(text: PolicyText) -> Policy:
    """Builds the policy that a text names; `preset=NAME` chooses one of its named settings.

    Raises:
        UserError: naming an unknown policy, preset or option, or a value that does not fit.
    """
    cls = POLICIES.get(text.name)
    if cls is None:
        raise UserError(f"--policy {text.name}: unknown; known are {', '.join(POLICIES)}")
    options = dict(text.options)
    presets = PRESETS.get(text.name, {})
    build: Any = cls
    if "preset" in options and presets:
        preset = options.pop("preset")
        if preset not in presets:
            raise UserError(
                f"--policy {text.name}: unknown preset {preset!r}; known are {', '.join(presets)}"
            )
        build = presets[preset]
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {}
    for key, value in options.items():
        if key not in known:
            choices = ", ".join([*known, *(["preset"] if presets else []), *PLAN_OPTIONS])
            raise UserError(f"--policy {text.name}: unknown option {key!r}; known are {choices}")
        values[key] = _read(text.name, key, value, hints[key])
    try:
        return build(**values)
    except ValueError as error:
        raise UserError(f"--policy {text.name}: {error}") from None


def make_plan(text: PolicyText, budget: Budget, *, headroom: int) -> CachePlan:
    """The cache plan of a policy under the run's budget; `full` takes none.

    Options of the plan itself stand among those of the policy, see `PLAN_OPTIONS`.

    Raises:
        UserError: as `make_policy`, and for a budget that the policy cannot meet.
    """
    own = {key: value for key, value in text.options if key in PLAN_OPTIONS}
    rest = tuple((key, value) for key, value in text.options if key not in PLAN_OPTIONS)
    policy = make_policy(dataclasses.replace(text, options=rest))
    if "budget" in own:
        budget = parse_budget(own.pop("budget"))
    options = {key: _read(text.name, key, value, PLAN_OPTIONS[key]) for key, value in own.items()}
    lists = options.pop("lists", None)
    if "heads" in options and options["heads"] not in ALLOCATIONS:
        raise UserError(
            f"--policy {text.name}: heads={options['heads']}: expected one of "
            f"{', '.join(ALLOCATIONS)}"
        )
    if lists is not None and "heads" not in options:
        raise UserError(f"--policy {text.name}: lists={lists}: needs heads=... too")
    try:
        if "heads" in options:
            options["heads"] = ALLOCATIONS[options["heads"]](lists=1 if lists is None else lists)
        return CachePlan(
            policy=policy,
            budget=budget.value if policy.needs_budget else None,
            headroom=headroom,
            **options,
        )
    except ValueError as error:
        raise UserError(f"--budget {budget} for --policy {text.label}: {error}") from None


def describe_plan(plan: CachePlan) -> dict[str, Any]:
    """What a configuration has to say of a plan, as plain JSON values.

    The policy's options and the budget always; of the cache's options those that were changed.
    """
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(CachePlan):
        value = getattr(plan, field.name)
        if field.name in PLAN_OPTIONS and field.name != "budget" and value != field.default:
            changed[field.name] = value
    if plan.heads is not None:
        changed["heads"] = {"name": plan.heads.name, **dataclasses.asdict(plan.heads)}
    return {
        "name": plan.policy.name,
        **dataclasses.asdict(plan.policy),
        "budget": plan.budget,
        **changed,
    }


def _read(policy: str, key: str, text: str, kind: Any) -> Any:
    """An option's value: a number, a truth value or a word, by the field's type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind, *_ = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--policy {policy}: {key}={text}: expected true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"--policy {policy}: {key}={text}: expected {wanted}") from None
    return text
