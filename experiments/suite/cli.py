"""Options of `python -m experiments.suite`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.core.errors import UserError
from experiments.core.options import DTYPES, Parser, count_of, parse_names
from experiments.suite.parts import PARTS

MODELS = ("smollm2-135m-instruct", "gemma-3-270m")

_EPILOG = """\
what is written:
  report.html    all tables, heat maps and curves; pictures are inside, nothing else is loaded
  suite.json     the numbers behind it
  MODEL/PART/    each benchmark's own results folder

examples:
  # both small models, meant for half an hour on two CPU cores
  python -m experiments.suite

  # a tiny selection, on a model of one's own
  python -m experiments.suite --quick --model DIR

The report is written anew after every part. An interrupted run goes on at the next row when the
same command is given again; a part that cannot be run, for want of its texts say, is named in the
report and the others go on. lm_eval is left out without the package of that name. All texts are
made from what Python and small wheels carry. Few rows, small models: a check of the whole path and
a first look, not a ranking.
"""


def build_parser() -> Parser:
    """The parser of the suite."""
    parser = Parser(
        prog="python -m experiments.suite",
        description="Runs a fixed selection of the benchmarks, and writes one report of them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        help="a folder, a .gguf file, or a hub id; repeat it for several (default: "
        f"{' and '.join(MODELS)})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny selection, to see that it works"
    )
    parser.add_argument(
        "--parts",
        metavar="A,B",
        type=lambda text: parse_names("--parts", text, PARTS),
        default=PARTS,
        help=f"what to run and to report (default: {','.join(PARTS)})",
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only, without pictures")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations; int8: bfloat16 with matrices of int8 (default: float32)",
    )
    parser.add_argument(
        "--seed",
        metavar="S",
        type=count_of("--seed", 0),
        default=0,
        help="of generated data (default: 0)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="results folder (default: results/suite-HASH, one for each configuration)",
    )
    return parser


def model_folders(models: Sequence[str] | None) -> dict[str, str]:
    """Folder name -> model, in the order given.

    Raises:
        UserError: two models would share a folder.
    """
    folders: dict[str, str] = {}
    for model in models or MODELS:
        # Lower case: some file systems do not tell case apart.
        name = Path(model).name.lower()
        if name in ("", ".", ".."):
            raise UserError(f"--model {model}: expected a name, a folder or a file")
        if name in folders:
            raise UserError(f"--model {model}: results of {folders[name]} go to the same folder")
        folders[name] = model
    return folders
