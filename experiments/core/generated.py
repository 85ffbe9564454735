"""Runs of tasks that are made to measure: what these are made to, and how their rows are asked."""

from __future__ import annotations

import argparse
from typing import Any

import models
from experiments.core.program import Generation, check_length
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.tasks import CountTokens, Measure, Row, SetSpec


def made_to_measure(
    args: argparse.Namespace, language_model: models.LanguageModel
) -> tuple[Measure, Generation]:
    """What the tasks of a run are made to, and how they are asked.

    Args:
        args: the parsed options, those of `add_generated_options` among them.
        language_model: from `load_model`.

    Raises:
        UserError: the model cannot hold a length.
    """
    longest = max(args.lengths)
    check_length("--lengths", longest, language_model)
    prompting = uncut_prompts(language_model, query_agnostic=args.query_agnostic)
    measure = Measure(
        lengths=args.lengths,
        rows=min(args.rows, args.limit or args.rows),
        seed=args.seed,
        chat=args.template == "chat",
        count=token_counter(language_model, prompting),
    )
    return measure, Generation(prompting=prompting, longest_prompt=longest)


def uncut_prompts(
    language_model: models.LanguageModel, *, query_agnostic: bool = False
) -> Prompting:
    """How rows that fit become prompts: none is cut."""
    return Prompting(
        protocol="official",
        max_length=None,
        eos_ids=language_model.eos_ids,
        turn_end_ids=language_model.turn_end_ids,
        query_agnostic=query_agnostic,
    )


def token_counter(language_model: models.LanguageModel, prompting: Prompting) -> CountTokens:
    """Counts the tokens of the prompts that rows become."""

    def count(spec: SetSpec, row: Row) -> int:
        return len(build_prompt(row, spec, language_model.tokenizer, prompting).ids)

    return count


def mode_of(args: argparse.Namespace) -> str:
    """The choice of `--query-agnostic` in words, for titles."""
    return "query-agnostic" if args.query_agnostic else "query-aware"


def prompt_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_generated_options` that influence a prediction, but not a row."""
    return {"template": args.template, "query_agnostic": args.query_agnostic}
