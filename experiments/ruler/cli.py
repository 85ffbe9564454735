"""Options of `python -m experiments.ruler`."""

from __future__ import annotations

import argparse
import re

from experiments.core.errors import UserError
from experiments.core.options import Parser, add_common_options, count_of
from experiments.ruler.tasks import TASKS

_LEAST_LENGTH = 256

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
    group.add_argument(
        "--lengths",
        metavar="T,T",
        type=parse_lengths,
        default=(1024,),
        help="tokens of prompt and generation together, separated by commas; 4k is 4096 "
        "(default: 1024)",
    )
    group.add_argument(
        "--rows",
        metavar="N",
        type=count_of("--rows", 1),
        default=5,
        help="rows in each set (default: 5)",
    )
    group.add_argument(
        "--query-agnostic",
        action="store_true",
        help="compress the context before the question is seen, then feed the question (default: "
        "the question is in the prompt that is compressed)",
    )
    group.add_argument(
        "--template",
        choices=("chat", "none"),
        default="chat",
        help="chat: the model's chat template, where it has one; none: the bare prompt "
        "(default: chat)",
    )
    return parser


def parse_tasks(text: str) -> tuple[str, ...]:
    """Reads the names of tasks.

    Raises:
        UserError: naming an unknown task, or one given twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: unknown task {name!r}; known are {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise UserError(f"--tasks: {name} is given twice")
    return names


def parse_lengths(text: str) -> tuple[int, ...]:
    """Reads lengths in tokens, "4096" or "4k".

    Raises:
        UserError: for anything else, a length below 256, or one given twice.
    """
    lengths = []
    for part in text.lower().split(","):
        match = re.fullmatch(r"\s*(\d+)(k?)\s*", part, re.ASCII)
        length = int(match[1]) * (1024 if match[2] else 1) if match else 0
        if length < _LEAST_LENGTH:
            raise UserError(
                f"--lengths {text}: expected lengths from {_LEAST_LENGTH} on, such as 4096 or 4k"
            )
        if length in lengths:
            raise UserError(f"--lengths {text}: {length} is given twice")
        lengths.append(length)
    return tuple(lengths)
