"""Options of `python -m experiments.fidelity`."""

from __future__ import annotations

import argparse

from experiments.core.options import Parser, add_common_options, count_of
from experiments.longbench.cli import add_set_options

_EPILOG = """\
what is measured, all against the full cache of the same prefill:
  attention  relative error of each layer's attention output after W_O, by layer and by head,
             every layer given the queries of the full cache: the cost of its own eviction
  residual   relative error of the residual stream after each layer, earlier layers' errors
             included; "hidden" is the same after the final norm
  KL, top-1  of the next-token distributions after each token of the continuation: the divergence
             KL(full || evicted) in nats, and how often the most likely token is the same
  overlap    share of the kept past tokens that leave-one-out would keep too: the oracle's set
             holds the tokens whose removal alone changes the layer's output most for the last W
             queries of the prompt, found by taking away every single one

The continuation is what the model itself answers with the full cache, fed token by token to every
cache. An error of 0 is exact; a KL of 0.01 is hardly seen in an answer, one of 1 is another answer.

what is written:
  fidelity.json   means and standard errors over the rows, and every value by layer and head
  table.md        the table that is printed
  *.png           lines by layer for all policies, a heat map layer x head for each
  run_meta.json   settings, versions, device, commit
A run that is interrupted starts over.

examples:
  # four policies at 128 slots a head, a prompt of each kind of the offline suite
  python -m experiments.fidelity --offline-rows 1

  # two settings of one policy, and SnapKV, at half the slots
  python -m experiments.fidelity --budget 64 --sets few_shot \\
      --policy restkv --policy restkv:preset=robust --policy snapkv

  # without the oracle, which costs most of the time on long prompts
  python -m experiments.fidelity --oracle-window 0 --offline-length 4096
"""


def build_parser() -> Parser:
    """The parser of the fidelity runner."""
    parser = Parser(
        prog="python -m experiments.fidelity",
        description="Measures, layer by layer and token by token, what eviction changes inside a\n"
        "model. One prefill of a prompt serves all policies.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="a folder of official files, 'hub', or 'offline'",
        generates=False,
    )
    add_set_options(parser)
    group = parser.add_argument_group("fidelity")
    group.add_argument(
        "--tokens",
        metavar="C",
        type=count_of("--tokens", 1),
        default=32,
        help="length of the continuation, fewer where an answer ends before (default: 32)",
    )
    group.add_argument(
        "--oracle-window",
        metavar="W",
        type=count_of("--oracle-window", 0),
        default=32,
        help="last queries of the prompt that judge the oracle's set; 0 leaves the overlap out "
        "(default: 32)",
    )
    group.add_argument("--no-plots", action="store_true", help="write no PNG files")
    return parser
