"""What the programs do alike: the model and the policies at the start, the run at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
from experiments.core.compiled import keep_compiled_programs
from experiments.core.engine import EvictionEngine, question_room
from experiments.core.environment import environment, package_version
from experiments.core.errors import UserError
from experiments.core.options import PolicyText, chosen_policies
from experiments.core.plans import describe_plan, make_plan
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.results import Record, folder_name, prediction_row
from experiments.core.runner import Ask, Score, generating
from experiments.core.session import Finish, Regroup, describe_sets, run_session
from experiments.core.table import print_tables
from experiments.core.tasks import TaskSet
from experiments.core.uncertainty import Average
from restkv_jax.decode import weights_fingerprint

_DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Rows are asked by letting the model answer them.

    Attributes:
        prompting: how rows become prompts.
        longest_prompt: tokens of the longest prompt, chat template included.
        temperature: of sampling; 0 takes the most likely token.
    """

    prompting: Prompting
    longest_prompt: int
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a runner asks, and how.

    Attributes:
        name: its name, as in `python -m experiments.NAME`.
        title: title of the score table.
        sets: the sets to ask.
        averages: means over sets that the results hold.
        how: a generation, or what makes something else that asks the rows.
        score: scores one prediction.
        digits: decimals of the scores.
        record: format of the prediction files.
        finish: adds the benchmark's own files and tables to those of a finished run.
        regroup: see `session.run_session`.
        most_together: likewise.
        settings: the runner's own options that influence a prediction, as plain JSON values.
    """

    name: str
    title: str
    sets: Sequence[TaskSet]
    averages: Sequence[Average]
    how: Generation | Callable[[], Ask]
    score: Score
    digits: int = 2
    record: Record = prediction_row
    finish: Finish | None = None
    regroup: Regroup | None = None
    most_together: int | None = None
    settings: Mapping[str, Any]


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
    """Loads the model of a run, whose compiled programs are kept on disk.

    Raises:
        UserError: it cannot be had.
    """
    keep_compiled_programs()
    try:
        return models.load(args.model or _DEFAULT_MODEL, dtype=args.dtype)
    except models.CheckpointError as error:
        raise UserError(f"--model: {error}") from None


def announce(
    language_model: models.LanguageModel, sets: Sequence[TaskSet], notes: Sequence[str]
) -> None:
    """Says what is measured, before the first row is."""
    rows = sum(len(task.rows) for task in sets)
    print(f"model:  {language_model.name}, {language_model.weights_bytes / 1e6:.0f} MB of weights")
    print(f"data:   {', '.join(task.spec.name for task in sets)} ({rows} rows)")
    for note in notes:
        print(f"        {note}")
    sys.stdout.flush()


def run_benchmark(
    args: argparse.Namespace,
    language_model: models.LanguageModel,
    policies: Sequence[PolicyText],
    benchmark: Benchmark,
) -> int:
    """Asks, stores, scores and prints; the exit code is 0.

    Args:
        args: the parsed options, those of `add_common_options` among them.
        language_model: from `load_model`.
        policies: from `read_policies`.
        benchmark: what is asked.

    Raises:
        UserError: whatever the user can put right.
    """
    sets = benchmark.sets
    config = _config(args, language_model, policies, benchmark)
    how = benchmark.how
    make_ask = (
        _generating(args, language_model, policies, sets, how)
        if isinstance(how, Generation)
        else how
    )
    readable = f"{benchmark.name}-{Path(language_model.name).name}-{args.budget}"
    folder = args.out or Path("results") / folder_name(readable, config)
    tables = run_session(
        folder=folder,
        config=config,
        environment=environment(),
        title=benchmark.title,
        sets=sets,
        policies=[policy.label for policy in policies],
        make_ask=make_ask,
        score=benchmark.score,
        averages=benchmark.averages,
        digits=benchmark.digits,
        record=benchmark.record,
        finish=benchmark.finish,
        regroup=benchmark.regroup,
        most_together=benchmark.most_together,
    )
    print_tables(tables)
    print(f"results: {folder}")
    return 0


def check_length(option: str, length: int, language_model: models.LanguageModel) -> None:
    """Refuses a length that the model cannot hold.

    Raises:
        UserError: naming the option, and what the model holds.
    """
    context = language_model.config.max_length
    if context is not None and length > context:
        raise UserError(f"{option} {length}: the model holds {context} tokens")


def _generating(
    args: argparse.Namespace,
    language_model: models.LanguageModel,
    policies: Sequence[PolicyText],
    sets: Sequence[TaskSet],
    how: Generation,
) -> Callable[[], Ask]:
    headroom = max(task.spec.max_new_tokens for task in sets)
    headroom += question_room(_longest_question(language_model, sets, how.prompting))
    plans = {policy.label: make_plan(policy, args.budget, headroom=headroom) for policy in policies}

    def make_ask() -> Ask:
        engine = EvictionEngine(
            language_model.model,
            plans,
            longest_prompt=how.longest_prompt,
            weights_bytes=language_model.weights_bytes,
            temperature=how.temperature,
            together=args.together,
        )
        return generating(engine, language_model.tokenizer, how.prompting, args.seed)

    return make_ask


def _longest_question(
    language_model: models.LanguageModel, sets: Sequence[TaskSet], prompting: Prompting
) -> int:
    """Tokens of the longest question that is fed to a compressed cache; 0 if none is."""
    if not prompting.query_agnostic:
        return 0
    prompts = (
        build_prompt(row, task.spec, language_model.tokenizer, prompting)
        for task in sets
        for row in task.rows
    )
    return max(len(prompt.ids) - (prompt.context_tokens or 0) for prompt in prompts)


def _config(
    args: argparse.Namespace,
    language_model: models.LanguageModel,
    policies: Sequence[PolicyText],
    benchmark: Benchmark,
) -> dict[str, Any]:
    """Everything that influences a prediction: rows are only reused where all of it is equal."""
    return {
        "benchmark": benchmark.name,
        "model": language_model.name,
        "weights": weights_fingerprint(language_model.model),
        "dtype": args.dtype,
        **({"together": args.together} if isinstance(benchmark.how, Generation) else {}),
        "policies": {
            policy.label: describe_plan(make_plan(policy, args.budget, headroom=0))
            for policy in policies
        },
        **benchmark.settings,
        "seed": args.seed,
        "version": package_version("restkv-jax"),
        "sets": describe_sets(benchmark.sets),
    }
