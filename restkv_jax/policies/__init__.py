"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable

from restkv_jax.policies.ablation import Ablation
from restkv_jax.policies.base import Policy, TokenPolicy, WindowPolicy
from restkv_jax.policies.caote import CAOTE
from restkv_jax.policies.criticalkv import CriticalKV
from restkv_jax.policies.dropkv import DropKV
from restkv_jax.policies.expected_attention import ExpectedAttention
from restkv_jax.policies.full import Full
from restkv_jax.policies.h2o import H2O
from restkv_jax.policies.keydiff import KeyDiff
from restkv_jax.policies.knorm import Knorm
from restkv_jax.policies.lacache import LaCache
from restkv_jax.policies.random import Random
from restkv_jax.policies.restkv import RestKV
from restkv_jax.policies.snapkv import SnapKV
from restkv_jax.policies.streaming import Streaming
from restkv_jax.policies.tova import TOVA
from restkv_jax.policies.vnorm import VNorm

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Full,
        Streaming,
        H2O,
        TOVA,
        SnapKV,
        LaCache,
        RestKV,
        CAOTE,
        DropKV,
        CriticalKV,
        ExpectedAttention,
        Knorm,
        KeyDiff,
        VNorm,
        Random,
        Ablation,
    )
}

# Named settings, as constructors of the policy that they belong to.
PRESETS: dict[str, dict[str, Callable[..., Policy]]] = {
    RestKV.name: {
        "released": RestKV.released,
        "paper": RestKV.paper,
        "robust": RestKV.robust,
    },
}

__all__ = [
    "CAOTE",
    "H2O",
    "POLICIES",
    "PRESETS",
    "TOVA",
    "Ablation",
    "CriticalKV",
    "DropKV",
    "ExpectedAttention",
    "Full",
    "KeyDiff",
    "Knorm",
    "LaCache",
    "Policy",
    "Random",
    "RestKV",
    "SnapKV",
    "Streaming",
    "TokenPolicy",
    "VNorm",
    "WindowPolicy",
]
