"""`python -m experiments.lm_eval`: the lm-evaluation-harness on models with evicted caches."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.environment import environment, package_version
from experiments.core.errors import UserError, run_main
from experiments.core.options import PolicyText
from experiments.core.plans import describe_plan, make_plan
from experiments.core.program import check_length, load_model, read_policies
from experiments.core.results import ResultStore, fingerprint, folder_name
from experiments.core.storage import RowFile, dump_json, write_atomic
from experiments.core.table import TextTable, markdown, print_tables
from experiments.lm_eval.cli import build_parser
from experiments.lm_eval.report import (
    metric_rows,
    plain_results,
    report_tables,
    sort_metrics,
    summarise_sets,
)
from experiments.lm_eval.tasks import (
    check_rows,
    find_tasks,
    harness_aggregate,
    load_tasks,
    task_folder,
)
from models import LanguageModel
from restkv_jax.decode import weights_fingerprint

_DEFAULT_LENGTH = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: whatever the user can put right.
    """
    args = build_parser().parse_args(argv)
    policies = read_policies(args)  # cheap complaints first: before anything is downloaded
    if args.data != "hub":
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    data = task_folder(args)
    names = [name.strip() for name in args.tasks.split(",")]
    manager = find_tasks(names, data)
    tasks = load_tasks(manager, names)
    check_rows(tasks, limit=args.limit, fewshot=args.fewshot, seed=args.seed)
    language_model = load_model(args)
    if args.max_length is not None:
        check_length("--max-length", args.max_length, language_model)
    max_length = args.max_length or language_model.config.max_length or _DEFAULT_LENGTH
    key = {
        "model": language_model.name,
        "weights": weights_fingerprint(language_model.model),
        "dtype": args.dtype,
        "template": args.template,
        "first_token": args.first_token,
        "evict_every": args.evict_every,
        "max_length": max_length,
        "version": package_version("restkv-jax"),
        "harness": package_version("lm_eval"),
    }
    plans = {p.label: describe_plan(make_plan(p, args.budget, headroom=0)) for p in policies}
    config = {
        "benchmark": "lm_eval",
        **key,
        "policies": plans,
        "tasks": args.tasks,
        "fewshot": args.fewshot,
        "limit": args.limit,
        "seed": args.seed,
    }
    readable = f"lm_eval-{Path(language_model.name).name}-{args.budget}"
    folder = args.out or Path("results") / folder_name(readable, config)
    print(f"model:  {language_model.name}, {language_model.weights_bytes / 1e6:.0f} MB of weights")
    print(f"tasks:  {args.tasks}")
    if args.data == "offline":
        print("        These are two tasks of OURS, from Python's own texts: no known benchmark.")
        print("        The harness's: --data hub, or --data DIR with task files.")
    sys.stdout.flush()
    with ResultStore.open(folder, config) as store:
        store.write_meta({"finished": False, "environment": environment()})
        # The harness remembers answers by the request alone: a file for all that they depend on.
        requests = {
            label: folder / "requests" / f"{label}-{fingerprint({**key, 'policy': plan})}"
            for label, plan in plans.items()
        }
        found, own = _evaluate(args, names, manager, language_model, policies, requests, max_length)
        tables = _report(store, found, own, tasks)
        store.write_meta({"finished": True, "environment": environment()})
    print_tables(tables)
    print(f"results: {folder}")
    return 0


def _evaluate(
    args: argparse.Namespace,
    names: Sequence[str],
    manager: Any,
    language_model: LanguageModel,
    policies: Sequence[PolicyText],
    requests: dict[str, Path],
    max_length: int,
) -> tuple[dict[str, Any], TextTable]:
    """What the harness returns for each policy, and the table of compressions."""
    from lm_eval import simple_evaluate

    from experiments.lm_eval.model import EvictedLM
    from experiments.lm_eval.rolling import rolling_score
    from experiments.lm_eval.scoring import Scorer, compression_table, read_compression

    notes = {label: RowFile(Path(f"{path}.jsonl")) for label, path in requests.items()}
    scorer = Scorer(
        language_model,
        policies,
        args.budget,
        first_token=args.first_token,
        compression=notes,
    )
    found = {}
    for policy in policies:
        requests[policy.label].parent.mkdir(parents=True, exist_ok=True)
        lm = EvictedLM(
            scorer,
            policy.label,
            rolling=rolling_score(
                scorer.model,
                policy,
                args.budget,
                evict_every=args.evict_every,
                max_length=max_length,
            ),
            max_length=max_length,
        )
        try:
            found[policy.label] = simple_evaluate(
                model=lm,
                tasks=list(names),
                task_manager=manager,
                num_fewshot=args.fewshot,
                limit=args.limit,
                use_cache=str(requests[policy.label]),
                apply_chat_template=args.template == "chat",
                bootstrap_iters=0,  # errors and intervals are ours, on the same rows
                random_seed=args.seed,
                numpy_random_seed=args.seed,
                fewshot_random_seed=args.seed,
            )
        except (OSError, ConnectionError) as error:
            raise UserError(f"--tasks {args.tasks}: cannot be loaded ({error})") from error
    compression = {label: read_compression(file) for label, file in notes.items()}
    return found, compression_table(compression)


def _report(
    store: ResultStore, found: dict[str, Any], compression: TextTable, loaded: Mapping[str, Any]
) -> list[TextTable]:
    harness = {policy: plain_results(results) for policy, results in found.items()}
    write_atomic(store.folder / "harness.json", dump_json(harness))
    columns = list(compression.columns[1:])
    write_atomic(
        store.folder / "compression.json",
        dump_json({row[0]: dict(zip(columns, row[1:], strict=True)) for row in compression.rows}),
    )
    metrics = sort_metrics(
        {policy: metric_rows(results) for policy, results in found.items()},
        lambda metric: harness_aggregate(loaded, metric),
    )
    result = store.write_result(metrics.scores)
    sets = summarise_sets(metrics)
    write_atomic(store.folder / "sets.json", dump_json(sets))
    figures, printed, every = report_tables(result, sets, harness, metrics.others)
    write_atomic(store.folder / "table.md", markdown([*figures, compression, *every]))
    return [*figures, compression, *printed]


if __name__ == "__main__":
    sys.exit(run_main(main))
