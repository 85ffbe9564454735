"""Options of `python -m experiments.efficiency`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from experiments.core.errors import UserError
from experiments.core.options import DTYPES, Parser, count_of, parse_lengths, parse_policy
from experiments.efficiency.cells import CHUNK
from experiments.efficiency.subject import RANDOM

_EPILOG = f"""\
what is measured in each cell (a length, a batch, a policy, a budget):
  first token  prefill with its eviction, and drawing the first token
  score, evict what scoring, and selecting and moving, take in all layers, each timed alone;
               "of dense" is their share of a prefill that keeps nothing
  ms/token     a step of the compiled decode loop, {CHUNK} of them in a call
  x full       how much faster a step is than with the full cache at the same length and batch,
               that one with the better of this library's attention and JAX's own (cuDNN on GPU)
  cache, peak  bytes of the cache, and what the compiled programs have alive, weights counted
  of floor     what the device would need at best, as a share of the time: weights and cache over
               its memory bandwidth, or operations over its peak, whichever is longer; both are
               measured in the same run
Times are medians. A cell that cannot fit is refused by its shapes, before it allocates anything.

what is written, into --out:
  results.json  every cell as soon as it is measured; the same command goes on with the next one
  table.md      the table that is printed
  *.png         first token, decoded token and peak memory against the length, for each batch

examples:
  # scoring at 8,192 tokens beside SnapKV's and beside the prefill, on CPU
  python -m experiments.efficiency --lengths 8k --tokens 32 \\
      --policy snapkv --policy restkv --policy restkv:preset=robust

  # an 8B model on a GPU with 140 GB (H200), 4k to 128k; no checkpoint is needed
  python -m experiments.efficiency --model random:llama-3.1-8b --dtype bfloat16 \\
      --lengths 4k,16k,32k,64k,128k --batch 1 --budget 1024
  python -m experiments.efficiency --model random:llama-3.1-8b --dtype bfloat16 \\
      --lengths 4k,8k,16k --batch 16 --budget 1024
  python -m experiments.efficiency --model random:llama-3.1-8b --dtype bfloat16 \\
      --lengths 128k --batch 4 --budget 1024 --policy full --policy restkv

  # the same with the shapes of Mistral-7B
  python -m experiments.efficiency --model random:mistral-7b --dtype bfloat16 \\
      --lengths 4k,32k --batch 1 --budget 1024
"""


def parse_batches(text: str) -> tuple[int, ...]:
    """Reads batch sizes that are separated by commas.

    Raises:
        UserError: anything but whole numbers of at least 1, each given once.
    """
    return _counts("--batch", text)


def parse_budgets(text: str) -> tuple[int, ...]:
    """Reads slots a head that are separated by commas.

    Raises:
        UserError: anything but whole numbers of at least 1, each given once.
    """
    return _counts("--budget", text)


def build_parser() -> Parser:
    """The program's command line."""
    parser = Parser(
        prog="python -m experiments.efficiency",
        description="Measures what a model costs with evicted caches: time to the first token,\n"
        "scoring, eviction, decoding and memory, beside the full cache and the device's floor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        metavar="MODEL",
        help="a checkpoint (folder, .gguf, hub id, name), or published shapes with random weights: "
        f"{', '.join(f'random:{name}' for name in RANDOM)} (default: smollm2-135m-instruct)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--lengths",
        type=parse_lengths,
        default=(512, 2048),
        metavar="T,...",
        help="tokens of the prompt, such as 4k,128k (default: 512,2048)",
    )
    parser.add_argument(
        "--batch", type=parse_batches, default=(1,), metavar="B,...", help="prompts (default: 1)"
    )
    parser.add_argument(
        "--budget",
        type=parse_budgets,
        default=(128,),
        metavar="S,...",
        help="slots a head of policies that evict (default: 128)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        type=parse_policy,
        metavar="POLICY",
        help="NAME:key=value,...; repeat it for several (default: full, streaming, snapkv, restkv)",
    )
    parser.add_argument(
        "--tokens",
        type=count_of("--tokens", CHUNK),
        default=128,
        metavar="N",
        help=f"decoded tokens, rounded up to a multiple of {CHUNK} (default: 128)",
    )
    parser.add_argument(
        "--repeats", type=count_of("--repeats", 1), default=5, help="of each median (default: 5)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: under results/)")
    parser.add_argument("--no-plots", action="store_true", help="write no PNG files")
    return parser


def _counts(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", part, re.ASCII) for part in parts):
        raise UserError(f"{option} {text}: expected whole numbers of at least 1, such as 1,8")
    if len(set(parts)) < len(parts):
        raise UserError(f"{option} {text}: one is given twice")
    return tuple(map(int, parts))
