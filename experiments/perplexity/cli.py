"""Options of `python -m experiments.perplexity`."""

from __future__ import annotations

import argparse

from experiments.core.options import Parser, add_common_options, count_of, parse_names
from experiments.perplexity.documents import MODES

_EPILOG = """\
the two modes:
  decode    every token is predicted from a cache that is evicted while the text goes on: whenever
            --evict-every tokens have filled the slots behind the budget, each head goes down to the
            budget again. Up to there nothing was evicted, and all policies are the full cache.
  prefill   the first --prompt tokens are evicted once, with their last queries, and the others
            follow; the first of them is predicted by the prefill itself.
What is compared is the mean negative log-likelihood of a text in nats a token, lower is better;
perplexity is the exponential of its mean over all tokens, and of the mean less and more a standard
error over the texts. Ratios of perplexities are exponentials of paired differences; they have an
interval from five texts on.

what is written, beside what every benchmark writes:
  perplexity.json        perplexities of all tokens and by position, and ratios of all policies
  perplexity-MODE.png    by position

examples:
  # four texts of 1,024 tokens that Python carries
  python -m experiments.perplexity

  # a book, or WikiText-2, in texts of 8,192 tokens
  python -m experiments.perplexity --data book.txt --length 8192 --prompt 7168 --budget 512

  # eviction token by token against every 64 tokens
  python -m experiments.perplexity --modes decode --policy tova:evict_every=1 --policy tova

An interrupted run goes on at the next text when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the perplexity runner."""
    parser = Parser(
        prog="python -m experiments.perplexity",
        description="Measures how well long texts are predicted from evicted caches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="a text file (.txt, .raw, or .jsonl with a field 'text'; gzipped or not), a "
        "folder of them, or 'offline' (prose that Python carries)",
        generates=False,
    )
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--modes",
        metavar="A,B",
        type=lambda text: parse_names("--modes", text, MODES),
        default=MODES,
        help=f"what is evicted when, see below (default: {','.join(MODES)})",
    )
    group.add_argument(
        "--length",
        metavar="T",
        type=count_of("--length", 64),
        default=1024,
        help="tokens of each text (default: 1024)",
    )
    group.add_argument(
        "--prompt",
        metavar="P",
        type=count_of("--prompt", 1),
        help="tokens that mode prefill evicts from (default: half of the length)",
    )
    group.add_argument(
        "--rows",
        metavar="N",
        type=count_of("--rows", 1),
        default=4,
        help="texts; long ones are cut into several (default: 4)",
    )
    group.add_argument(
        "--evict-every",
        metavar="E",
        type=count_of("--evict-every", 1),
        default=64,
        help="tokens between two evictions of mode decode (default: 64)",
    )
    group.add_argument(
        "--bins",
        metavar="N",
        type=count_of("--bins", 1),
        default=8,
        help="stretches of positions in tables and plots (default: 8)",
    )
    group.add_argument("--no-plots", action="store_true", help="write no PNG files")
    return parser
