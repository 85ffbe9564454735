"""`python -m experiments.export RESULTS`: a finished run as kvpress lays its results out.

Writes a folder for each policy, and for each length of a benchmark that has several:

    <benchmark>__<length>__<model>__<policy>__<ratio>/predictions.csv, metrics.json, config.yaml

Names have no length where the benchmark has none, and end with __query_aware where contexts were
compressed with the question in sight. The ratio is the share of the contexts' tokens that was
evicted, as measured; `compression_ratio` in the files is the same, of each row and of all. Earlier
versions did not write down how long a context was that they compressed before the question: there
it is the share of the whole prompt, and `compression_ratio_of` in config.yaml says "prompt".
Contexts are left out, and so are questions of earlier versions. Rows compare with kvpress's where
prompts do: the wordings of our benchmarks are our own.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.core.errors import UserError, run_main
from experiments.core.options import Parser
from experiments.core.storage import RowFile, dump_json, write_atomic

_COLUMNS = (
    "task",
    "question",
    "answer_prefix",
    "answer",
    "max_new_tokens",
    "predicted_answer",
    "compression_ratio",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; the exit code is 0.

    Raises:
        UserError: the folder holds no finished run, or cannot be written.
    """
    parser = Parser(
        prog="python -m experiments.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", metavar="RESULTS", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to put the folders (default: RESULTS/kvpress)",
    )
    args = parser.parse_args(argv)
    for folder in export(args.results, args.out or args.results / "kvpress"):
        print(folder)
    return 0


def export(results: Path, out: Path) -> list[Path]:
    """Writes the folders and returns them.

    Raises:
        UserError: see `main`.
    """
    meta, scores = (_read(results / name) for name in ("run_meta.json", "result.json"))
    if not meta.get("finished"):
        raise UserError(f"{results}: the run is not finished; give its command again")
    config = meta["config"]
    if "sets" not in config:
        raise UserError(f"{results}: {config['benchmark']} has no answers to export")
    query_aware = not config.get("query_agnostic", False)
    groups: dict[str, list[str]] = {}
    for name in config["sets"]:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    written = []
    for policy, plan in config["policies"].items():
        for length, names in groups.items():
            costs = {name: _costs(results, policy, name) for name in names}
            rows = [
                row for name in names for row in _rows(results, policy, name, config, costs[name])
            ]
            ratio = statistics.fmean(row["compression_ratio"] for row in rows)
            noted = all("context_tokens" in cost for own in costs.values() for cost in own.values())
            parts = (
                config["benchmark"],
                length,
                config["model"].replace("/", "--"),
                policy,
                f"{ratio:.2f}",
                "query_aware" if query_aware else "",
            )
            folder = out / re.sub(r"[^A-Za-z0-9._=+-]", "-", "__".join(filter(None, parts)))
            write_atomic(folder / "predictions.csv", _csv(rows))
            # A set may have several scores, with a word behind its name.
            found = {
                name.rpartition("/")[2]: score
                for name, score in scores["score"][policy].items()
                if name in names or name.rpartition(" ")[0] in names
            }
            write_atomic(folder / "metrics.json", dump_json(_metrics(found, config["benchmark"])))
            settings = {
                "dataset": config["benchmark"],
                "data_dir": length or None,
                "model": config["model"],
                "press_name": policy,
                "compression_ratio": round(ratio, 4),
                "compression_ratio_of": "context" if query_aware or noted else "prompt",
                "query_aware": query_aware,
                "seed": config["seed"],
                "policy": plan,
                "version": config["version"],
            }
            # JSON values are YAML too.
            lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
            write_atomic(folder / "config.yaml", "".join(lines))
            written.append(folder)
    return written


def _costs(results: Path, policy: str, name: str) -> dict[int, dict[str, Any]]:
    """What the rows of one set cost, by their numbers."""
    file = RowFile(results / "timing" / policy / f"{name}.jsonl")
    return {row["index"]: row for row in file.load()}


def _rows(
    results: Path,
    policy: str,
    name: str,
    config: Mapping[str, Any],
    costs: Mapping[int, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The lines of one set."""
    predictions = RowFile(results / "pred" / policy / f"{name}.jsonl").load()
    rows = []
    for row in predictions:
        if not isinstance(row["pred"], str):
            raise UserError(f"{results}: {config['benchmark']} has no answers to export")
        cost = costs[row["index"]]
        compressed = cost.get("context_tokens", cost["prompt_tokens"])
        rows.append(
            {
                "task": name.rpartition("/")[2],
                "question": row.get("input", ""),
                "answer_prefix": row.get("answer_prefix", ""),
                "answer": json.dumps(row.get("outputs", row.get("answers")), ensure_ascii=False),
                "max_new_tokens": config["sets"][name]["max_new_tokens"],
                "predicted_answer": row["pred"],
                "compression_ratio": round(1 - cost["kept_slots"] / compressed, 4),
            }
        )
    return rows


def _metrics(scores: Mapping[str, float], benchmark: str) -> dict[str, Any]:
    """RULER's scores have a name there."""
    if benchmark == "ruler":
        return {task: {"string_match": score} for task, score in scores.items()}
    return dict(scores)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    content = io.StringIO()
    lines = csv.DictWriter(content, _COLUMNS, lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return content.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


if __name__ == "__main__":
    sys.exit(run_main(main))
