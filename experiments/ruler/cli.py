"""Options of `python -m experiments.ruler`."""

from __future__ import annotations

import argparse

from experiments.core.options import (
    Parser,
    add_common_options,
    add_generated_options,
    add_prompts_option,
    parse_names,
)
from experiments.ruler.tasks import TASKS

_EPILOG = """\
examples:
  # the 11 tasks without question answering, 5 rows each: nothing is needed but the package index
  python -m experiments.ruler

  # all 13 tasks at two lengths, 100 rows each, with the questions in a folder
  python -m experiments.ruler --data DIR --lengths 4k,8k --rows 100

  # the context is compressed before the question is known
  python -m experiments.ruler --query-agnostic --budget 0.25

  # two variants of one policy on the needle tasks, keeping a fifth of each prompt
  python -m experiments.ruler --tasks niah_single_1,niah_multikey_1 --budget 0.2 \\
      --policy full --policy restkv --policy restkv:preset=robust

  # the official wordings (pip install "restkv-jax[eval]")
  python -m experiments.ruler --prompts official --data DIR --lengths 4k

A length counts the whole prompt, chat template included, and the longest answer. Published
results have 500 rows at 4k to 128k. experiments/ruler/sources.py says what DIR may hold. An
interrupted run goes on at the next row when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the RULER runner."""
    parser = Parser(
        prog="python -m experiments.ruler",
        description="Scores eviction policies on RULER's tasks, generated for the model's "
        "tokenizer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="where the questions of qa_1 and qa_2 are: a folder, 'hub', or 'offline', which "
        "leaves these two tasks out; a folder may also hold word lists and essays",
    )
    group = parser.add_argument_group("RULER")
    group.add_argument(
        "--tasks",
        metavar="A,B",
        type=parse_tasks,
        help=f"tasks, separated by commas, of {', '.join(TASKS)} (default: all whose texts can "
        "be had)",
    )
    add_generated_options(group, rows=5)
    add_prompts_option(group)
    return parser


def parse_tasks(text: str) -> tuple[str, ...]:
    """Reads the names of tasks.

    Raises:
        UserError: naming an unknown task, or one given twice.
    """
    return parse_names("--tasks", text, list(TASKS))
