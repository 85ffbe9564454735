"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable

from restkv_jax.policies.ablation import Ablation
from restkv_jax.policies.base import Policy, WindowPolicy
from restkv_jax.policies.full import Full
from restkv_jax.policies.restkv import RestKV
from restkv_jax.policies.snapkv import SnapKV
from restkv_jax.policies.streaming import Streaming

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Full, Streaming, SnapKV, RestKV, Ablation)
}

# Named settings, as constructors of the policy that they belong to.
PRESETS: dict[str, dict[str, Callable[..., Policy]]] = {
    RestKV.name: {"released": RestKV.released, "paper": RestKV.paper},
}

__all__ = [
    "POLICIES",
    "Ablation",
    "Full",
    "Policy",
    "RestKV",
    "SnapKV",
    "Streaming",
    "WindowPolicy",
]
