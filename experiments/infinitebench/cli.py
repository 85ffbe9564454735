"""Options of `python -m experiments.infinitebench`."""

from __future__ import annotations

import argparse

from experiments.core.options import (
    Parser,
    add_common_options,
    add_generated_options,
    count_of,
    parse_names,
)
from experiments.infinitebench.tasks import TASKS

_EPILOG = """\
examples:
  # the four tasks that are generated: nothing is needed but the package index
  python -m experiments.infinitebench

  # two of them at 64k and 128k tokens, 50 rows each
  python -m experiments.infinitebench --tasks passkey,kv_retrieval --lengths 64k,128k --rows 50

  # the benchmark's own rows, their middle cut to what the model holds
  python -m experiments.infinitebench --data hub --limit 20 --budget 1024

Generated lengths count the whole prompt and the longest answer. Lists and JSON objects end with a
whole entry, other texts are as long as the tokenizer allows. math_calc is run only if it is named.
An interrupted run goes on at the next row when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the InfiniteBench runner."""
    parser = Parser(
        prog="python -m experiments.infinitebench",
        description="Scores eviction policies on InfiniteBench's tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="'offline' (generates four tasks), a folder of the benchmark's files "
        "(passkey.jsonl, ...), or 'hub'",
    )
    group = parser.add_argument_group("InfiniteBench")
    group.add_argument(
        "--tasks",
        metavar="A,B",
        type=lambda text: parse_names("--tasks", text, list(TASKS)),
        help=f"tasks, separated by commas, of {', '.join(TASKS)} (default: all that there are)",
    )
    add_generated_options(group, rows=5)
    group.add_argument(
        "--max-length",
        metavar="T",
        type=count_of("--max-length", 16),
        help="longest prompt of the benchmark's own rows in tokens (default: what the model holds "
        "beside the longest answer and the chat template)",
    )
    return parser
