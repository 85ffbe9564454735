"""`python -m experiments.fidelity`: what eviction changes inside a model, by layer and token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.core.engine import check_fit
from experiments.core.environment import environment, package_version
from experiments.core.errors import run_main
from experiments.core.options import PolicyText
from experiments.core.plans import describe_plan, make_plan
from experiments.core.plots import require_matplotlib
from experiments.core.program import load_model, read_policies
from experiments.core.progress import RunProgress
from experiments.core.prompts import Prompting, build_prompt
from experiments.core.results import ResultStore, folder_name
from experiments.core.session import describe_sets
from experiments.core.storage import RowFile
from experiments.core.table import print_tables
from experiments.core.tasks import TaskSet
from experiments.fidelity.cli import build_parser
from experiments.fidelity.report import write_report
from experiments.longbench.cli import TEMPLATE_ROOM, load_sets, longest_text, prompting_of
from models import LanguageModel
from restkv_jax.decode import (
    CachePlan,
    Fidelity,
    Full,
    bucket_length,
    generate,
    measure_fidelity,
    pad_prompts,
    weights_fingerprint,
    with_output_factors,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)
    if not args.no_plots:
        require_matplotlib()
    language_model = load_model(args)
    max_length = longest_text(
        args,
        language_model.config.max_length,
        answer=args.tokens,
        chat=args.protocol == "official",
    )
    prompting = prompting_of(args, language_model, max_length)
    encode = language_model.tokenizer.encode
    sets, _ = load_sets(args, lambda text: len(encode(text)))
    config = _config(args, language_model, policies, sets, prompting)
    plans = {
        policy.label: make_plan(policy, args.budget, headroom=args.tokens) for policy in policies
    }
    check_fit(
        language_model.model,
        plans,
        bucket_length(max_length + TEMPLATE_ROOM),
        language_model.weights_bytes,
    )
    readable = f"fidelity-{Path(language_model.name).name}-{args.budget}"
    folder = args.out or Path("results") / folder_name(readable, config)
    with ResultStore.open(folder, config) as store:
        rows = RowFile(folder / "rows.jsonl")
        measured = measure(language_model, sets, plans, prompting, args, rows)
        store.write_meta({"environment": environment()})
        table = write_report(folder, measured, plots=not args.no_plots)
    print_tables([table])
    print(f"results: {folder}")
    return 0


def measure(
    language_model: LanguageModel,
    sets: Sequence[TaskSet],
    plans: Mapping[str, CachePlan],
    prompting: Prompting,
    args: argparse.Namespace,
    file: RowFile,
) -> dict[str, Fidelity]:
    """Measures every plan on every row of the sets that the file does not hold yet.

    Returns:
        label -> its measurement, a row for each prompt.
    """
    model = with_output_factors(language_model.model)
    full = CachePlan(policy=Full(), headroom=args.tokens)
    done = {(row["set"], row["number"]): row["plans"] for row in file.load()}
    parts: dict[str, list[Fidelity]] = {label: [] for label in plans}
    with RunProgress() as progress:
        for task in sets:
            name = task.spec.name
            progress.start_set(name, len(task.rows), [sum(key[0] == name for key in done)])
            for number, row in enumerate(task.rows):
                if (name, number) in done:
                    for label, values in done[name, number].items():
                        parts[label].append(Fidelity.from_lists(values))
                    continue
                prompt = build_prompt(row, task.spec, language_model.tokenizer, prompting)
                answer = generate(
                    model,
                    [prompt.ids],
                    plan=full,
                    max_new_tokens=args.tokens,
                    stop_tokens=prompt.stop_ids,
                )
                # Answers that end early are padded: one length compiles once.
                continuation = np.zeros((1, args.tokens), np.int32)
                follows = np.arange(args.tokens)[None] < answer.lengths[:, None]
                continuation[follows] = answer.rows()[0]
                found = measure_fidelity(
                    model,
                    *pad_prompts([prompt.ids]),
                    continuation,
                    follows,
                    plans=tuple(plans.values()),
                    oracle_window=args.oracle_window or None,
                )
                by_label = dict(zip(plans, found, strict=True))
                values = {label: one.to_lists() for label, one in by_label.items()}
                file.append({"set": name, "number": number, "plans": values})
                for label, one in by_label.items():
                    parts[label].append(one)
                progress.row_done()
            progress.end_set()
    return {label: Fidelity.concatenate(rows) for label, rows in parts.items()}


def _config(
    args: argparse.Namespace,
    language_model: LanguageModel,
    policies: Sequence[PolicyText],
    sets: Sequence[TaskSet],
    prompting: Prompting,
) -> dict[str, Any]:
    """Everything that influences a measurement."""
    return {
        "benchmark": "fidelity",
        "model": language_model.name,
        "weights": weights_fingerprint(language_model.model),
        "dtype": args.dtype,
        "policies": {
            policy.label: describe_plan(make_plan(policy, args.budget, headroom=0))
            for policy in policies
        },
        "protocol": prompting.protocol,
        "max_length": prompting.max_length,
        "tokens": args.tokens,
        "oracle_window": args.oracle_window,
        "seed": args.seed,
        "version": package_version("restkv-jax"),
        "sets": describe_sets(sets),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
