"""What the programs do alike at their start: read the policies, load the model."""

from __future__ import annotations

import argparse

import models
from experiments.core.errors import UserError
from experiments.core.options import PolicyText, chosen_policies
from experiments.core.plans import make_plan

_DEFAULT_MODEL = "smollm2-135m-instruct"


def read_policies(args: argparse.Namespace) -> tuple[PolicyText, ...]:
    """The policies of a run.

    Raises:
        UserError: an unknown policy or option, or a budget that does not suit one.
    """
    policies = chosen_policies(args.policy)
    for policy in policies:
        make_plan(policy, args.budget, headroom=0)
    return policies


def load_model(args: argparse.Namespace) -> models.LanguageModel:
    """Loads the model of a run.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return models.load(args.model or _DEFAULT_MODEL, dtype=args.dtype)
    except models.CheckpointError as error:
        raise UserError(f"--model: {error}") from None
