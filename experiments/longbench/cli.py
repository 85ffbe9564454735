"""Options of `python -m experiments.longbench`, and the sets that they choose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.core.errors import UserError
from experiments.core.options import (
    Parser,
    add_common_options,
    add_prompts_option,
    count_of,
    parse_names,
)
from experiments.core.prompts import Prompting
from experiments.core.tasks import SetSpec, TaskSet
from experiments.longbench.data import load_folder, load_hub
from experiments.longbench.offline import OFFLINE_SETS, build_suite
from experiments.longbench.sets import LONGBENCH_SETS, official_prompts

if TYPE_CHECKING:  # options are read, and complained of, before JAX is imported
    from models import LanguageModel

# The chat template's own tokens come on top of a prompt of `--max-length`.
TEMPLATE_ROOM = 256
# So do the beginning of an answer, and the few tokens by which a text that was cut may grow.
_PLAIN_ROOM = 32
# Fewest tokens of a prompt that `--max-length` takes.
_SHORTEST_TEXT = 16

_EPILOG = """\
examples:
  # the offline suite: no download but the model's
  python -m experiments.longbench

  # LongBench itself: two sets, ten rows of each, from a folder of official files
  python -m experiments.longbench --data DIR --sets hotpotqa,trec --limit 10

  # two variants of one policy against the full cache, keeping a fifth of each prompt
  python -m experiments.longbench --data hub --budget 0.2 \\
      --policy full --policy restkv --policy restkv:alpha=0.5

  # official wordings (pip install "restkv-jax[eval]"), the protocol of the published scripts
  python -m experiments.longbench --data DIR --prompts official --protocol released

An interrupted run goes on at the next row when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the LongBench runner."""
    parser = Parser(
        prog="python -m experiments.longbench",
        description="Scores eviction policies on LongBench, or on an offline suite in its format.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="offline",
        data_help="a folder of official files, 'hub', or 'offline'",
    )
    add_set_options(parser)
    return parser


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """Adds what `load_sets` and the prompts need beside the common options."""
    group = parser.add_argument_group("LongBench")
    group.add_argument(
        "--sets",
        metavar="A,B",
        help="sets to ask, separated by commas (default: all that the data holds)",
    )
    group.add_argument(
        "--longbench-e",
        action="store_true",
        help="rows of LongBench-E (SET_e.jsonl), even in length, and their scores by length",
    )
    group.add_argument(
        "--max-length",
        metavar="T",
        type=count_of("--max-length", _SHORTEST_TEXT),
        help="longest prompt in tokens, longer ones lose their middle (default: what the model "
        "holds beside the longest answer and the chat template)",
    )
    group.add_argument(
        "--protocol",
        choices=("official", "released"),
        default="official",
        help="official: LongBench's own (chat template but for six sets); released: that of the "
        "published ReST-KV scripts (no template, end of sequence only) (default: official)",
    )
    add_prompts_option(group)
    group.add_argument(
        "--offline-length",
        metavar="T",
        type=count_of("--offline-length", 256),
        default=1024,
        help="length in tokens of the offline suite's prompts (default: 1024)",
    )
    group.add_argument(
        "--offline-rows",
        metavar="N",
        type=count_of("--offline-rows", 1),
        default=4,
        help="rows in each set of the offline suite (default: 4)",
    )


def prompting_of(
    args: argparse.Namespace, language_model: LanguageModel, max_length: int
) -> Prompting:
    """How rows become prompts of at most `max_length` tokens, see `longest_text`."""
    return Prompting(
        protocol=args.protocol,
        max_length=max_length,
        eos_ids=language_model.eos_ids,
        turn_end_ids=language_model.turn_end_ids,
        inst_style="llama-2" in language_model.name.lower(),
    )


def choose_specs(text: str | None, known: dict[str, SetSpec]) -> list[SetSpec]:
    """The specifications of the sets named in `--sets`, all known ones without it.

    Raises:
        UserError: naming an unknown set, or one given twice.
    """
    if text is None:
        return list(known.values())
    return [known[name] for name in parse_names("--sets", text, list(known))]


def load_sets(
    args: argparse.Namespace, count_tokens: Callable[[str], int]
) -> tuple[list[TaskSet], str]:
    """Loads, or generates, what the options ask for.

    Args:
        args: the parsed options.
        count_tokens: length of a prompt in the model's tokens; used by the offline suite.

    Returns:
        The sets, and the title of the score table. Only real LongBench rows get its name.

    Raises:
        UserError: for unknown sets and for data that cannot be read.
    """
    if args.data == "offline":
        if args.prompts == "official":
            raise UserError("--prompts official: the offline suite has no official prompts")
        if args.longbench_e:
            raise UserError("--longbench-e: the offline suite is not LongBench")
        specs = choose_specs(args.sets, OFFLINE_SETS)
        sets = build_suite(
            specs,
            count_tokens=count_tokens,
            length=args.offline_length,
            rows=min(args.offline_rows, args.limit or args.offline_rows),
            seed=args.seed,
        )
        return sets, "offline suite (not LongBench), score 0-100"
    specs = _with_prompts(choose_specs(args.sets, LONGBENCH_SETS), args.prompts)
    if args.data == "hub":
        sets = load_hub(
            specs, limit=args.limit, explicit=args.sets is not None, even=args.longbench_e
        )
    else:
        sets = load_folder(
            Path(args.data),
            specs,
            limit=args.limit,
            explicit=args.sets is not None,
            even=args.longbench_e,
        )
    name = "LongBench-E" if args.longbench_e else "LongBench"
    return sets, f"{name} ({args.protocol} protocol, {args.prompts} wordings), score 0-100"


def _with_prompts(specs: Sequence[SetSpec], prompts: str) -> list[SetSpec]:
    if prompts == "own":
        return list(specs)
    official = official_prompts([spec.name for spec in specs])
    return [official[spec.name] for spec in specs]


def longest_text(args: argparse.Namespace, context: int | None, *, answer: int, chat: bool) -> int:
    """Longest prompt in tokens: what is asked for, else what the model holds beside the rest.

    Args:
        args: the parsed options, `--max-length` among them.
        context: tokens that the model holds; None if that is not known.
        answer: most tokens that follow a prompt.
        chat: whether a chat template may come on top of a prompt.

    Raises:
        UserError: the model cannot hold such a prompt and what comes with it.
    """
    if context is None:
        return args.max_length or 4096
    around = TEMPLATE_ROOM if chat else _PLAIN_ROOM
    most = context - answer - around
    if (args.max_length or _SHORTEST_TEXT) <= most:
        return args.max_length or most
    holds = (
        f"the model holds {context} tokens, of which answers take up to {answer} and "
        f"{'the chat template' if chat else 'what joins them'} up to {around}"
    )
    if most < _SHORTEST_TEXT:
        raise UserError(f"--model: no room for a prompt: {holds}")
    raise UserError(f"--max-length {args.max_length}: expected at most {most}: {holds}")
