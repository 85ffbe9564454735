"""Options of `python -m experiments.lm_eval`."""

from __future__ import annotations

import argparse

from experiments.core.options import Parser, add_common_options, count_of

_EPILOG = """\
what is measured: the tasks of the lm-evaluation-harness, with its prompts, few-shot examples and
metrics. The context of a request is prefilled and evicted, then its continuations are scored, or
the answer is generated, from the evicted cache. The harness's tasks are often shorter than a
budget: how far the contexts really were compressed is always printed. In tasks that score whole
texts the cache is evicted while a text goes on; what it held at the end of each window counts.

what is written:
  result.json         scores of all policies, errors, n, paired differences on the same rows, of
                      metrics that are a number from 0 to 1 for each row
  sets.json           the same of figures that a set has as a whole (perplexity, F1, correlation),
                      by the harness's own functions, with errors from a bootstrap of the rows
  harness.json        what the harness itself says of each policy
  compression.json    what contexts and whole texts were compressed to
  requests/           answers that are there already, a file for each policy
  table.md, run_meta.json

examples (pip install "restkv-jax[eval]"):
  # two tasks made from the texts that every Python carries, twenty rows of each
  python -m experiments.lm_eval --data offline --limit 20 --budget 64

  # 100 rows of two tasks from the hub
  python -m experiments.lm_eval --tasks lambada_openai,truthfulqa_mc2 --limit 100

  # tasks whose YAML files, and data, are in a folder; nothing is looked for elsewhere
  python -m experiments.lm_eval --data DIR --tasks my_task --budget 64

An interrupted run goes on after the last answer when the same command is given again.
"""


def build_parser() -> Parser:
    """The parser of the harness's runner."""
    parser = Parser(
        prog="python -m experiments.lm_eval",
        description="Runs tasks of the lm-evaluation-harness on models with evicted caches.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(
        parser,
        default_data="hub",
        data_help="'hub', a folder with more task files (.yaml), or 'offline' (two tasks of ours); "
        "the last two also turn the hub off",
        generates=False,
    )
    group = parser.add_argument_group("lm-evaluation-harness")
    group.add_argument(
        "--tasks",
        metavar="A,B",
        help="tasks or groups of them, separated by commas, as the harness names them (default, "
        "with --data offline: its two)",
    )
    group.add_argument(
        "--fewshot",
        metavar="N",
        type=count_of("--fewshot", 0),
        help="examples before each question (default: what the task says)",
    )
    group.add_argument(
        "--template",
        choices=("chat", "none"),
        default="none",
        help="chat: the model's chat template, for all tasks of the run; none: the bare prompt "
        "(default: none)",
    )
    group.add_argument(
        "--first-token",
        choices=("evicted", "prefill"),
        default="evicted",
        help="evicted: the context's last token is fed to the evicted cache, so that the first "
        "token of a continuation is predicted from there; prefill: the first token comes from the "
        "full prefill, so that answers of one token do not depend on the policy (default: evicted)",
    )
    group.add_argument(
        "--evict-every",
        metavar="E",
        type=count_of("--evict-every", 1),
        default=64,
        help="tokens between two evictions in tasks that score whole texts (default: 64)",
    )
    group.add_argument(
        "--max-length",
        metavar="T",
        type=count_of("--max-length", 16),
        help="most tokens of a context and what follows; longer ones lose their beginning "
        "(default: what the model holds, 4096 if it does not say)",
    )
    return parser
