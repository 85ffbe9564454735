"""The options that all runners share, and how their texts are read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from experiments.core.errors import UserError

# Those of `models.load`; importing it here would make every `--help` wait for JAX.
DTYPES = ("float32", "bfloat16", "int8")
DEFAULT_POLICIES = ("full", "streaming", "snapkv", "restkv")
_LEAST_LENGTH = 256
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class Slots:
    """A budget in cache slots per head."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A budget as a share of the prompt's length."""

    value: float

    def __str__(self) -> str:
        return str(self.value)


Budget = Slots | Ratio


@dataclasses.dataclass(frozen=True)
class PolicyText:
    """A policy as the user wrote it, values not interpreted.

    Attributes:
        name: the policy's name.
        options: (key, value) pairs in the order of their keys.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Name and options as one word, used in tables and as a folder name."""
        text = "+".join([self.name, *(f"{key}={value}" for key, value in self.options)])
        return re.sub(r"[^A-Za-z0-9._=+-]", "_", text)


def parse_policy(text: str) -> PolicyText:
    """Reads `NAME` or `NAME:key=value,key=value`.

    Raises:
        UserError: naming the part that is malformed or given twice.
    """
    name, colon, rest = text.strip().partition(":")
    if not _NAME.fullmatch(name):
        raise UserError(f"--policy {text!r}: expected NAME or NAME:key=value,key=value")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not _NAME.fullmatch(key) or not value:
            raise UserError(f"--policy {text!r}: {item.strip()!r} is not of the form key=value")
        if key in options:
            raise UserError(f"--policy {text!r}: {key} is given twice")
        options[key] = value
    return PolicyText(name, tuple(sorted(options.items())))


def parse_budget(text: str) -> Budget:
    """Reads a budget: a whole number is slots, a number with a point is a share of the prompt.

    Raises:
        UserError: if it is neither, not positive, or a share above 1.
    """
    problem = UserError(
        f"--budget {text}: expected slots (such as 128) or a ratio above 0 and up to 1.0"
    )
    if re.fullmatch(r"\d+", text.strip(), re.ASCII):
        if int(text) == 0:
            raise problem
        return Slots(int(text))
    try:
        ratio = float(text)
    except ValueError:
        raise problem from None
    if not 0 < ratio <= 1:
        raise problem
    return Ratio(ratio)


def count_of(option: str, least: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` on, for argparse's `type=`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text.strip(), re.ASCII) or int(text) < least:
            raise UserError(f"{option} {text}: expected a whole number of at least {least}")
        return int(text)

    return read


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint instead of printing the usage and leaving."""
        raise UserError(f"{message} (see --help)")


def add_common_options(
    parser: argparse.ArgumentParser, *, default_data: str, data_help: str, generates: bool = True
) -> None:
    """Adds the options that every runner has, in the groups that `--help` shows.

    Args:
        parser: the runner's parser.
        default_data: value of `--data` when it is not given.
        data_help: what `--data` may be.
        generates: the runner's rows are answered by generation.
    """
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--model",
        metavar="MODEL",
        help="a folder with config.json and safetensors, a .gguf file, or a hub id "
        "(default: SmolLM2-135M-Instruct, downloaded once)",
    )
    what.add_argument(
        "--data",
        metavar="SOURCE",
        default=default_data,
        help=f"{data_help} (default: {default_data})",
    )
    what.add_argument(
        "--limit",
        metavar="N",
        type=count_of("--limit", 1),
        help="ask the first N rows of each set only",
    )
    how = parser.add_argument_group("what is compared")
    how.add_argument(
        "--policy",
        metavar="POLICY",
        action="append",
        type=parse_policy,
        help="NAME or NAME:key=value,key=value; repeat it to compare several, one prefill serves "
        "them all; options of the cache stand there too: budget, layers=pyramid, heads=adakv or "
        "shared, decode_budget, evict_every, rope=slot, storage=int8 "
        f"(default: {', '.join(DEFAULT_POLICIES)})",
    )
    how.add_argument(
        "--budget",
        metavar="B",
        type=parse_budget,
        default=Slots(128),
        help="what an evicting policy keeps per head: slots (128) or a ratio of the prompt (0.2) "
        "(default: 128)",
    )
    run = parser.add_argument_group("how it is run")
    run.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations; int8: bfloat16 with matrices of int8 (default: float32)",
    )
    run.add_argument(
        "--seed",
        metavar="S",
        type=count_of("--seed", 0),
        default=0,
        help="of generated data and of sampling (default: 0)",
    )
    if generates:
        run.add_argument(
            "--together",
            action="store_true",
            help="decode caches of equal shape as one batch: with many policies several times as "
            "fast, but their decoding is no longer timed apart",
        )
    run.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="results folder; an interrupted run resumes there (default: results/NAME-HASH, one "
        "for each configuration)",
    )


def add_generated_options(group: argparse._ArgumentGroup, *, rows: int) -> None:
    """Adds what the benchmarks that make their prompts to measure have in common.

    Args:
        group: of the runner's own options.
        rows: default number of rows in each set.
    """
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
        default=rows,
        help=f"rows in each set (default: {rows})",
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


def add_prompts_option(group: argparse._ArgumentGroup) -> None:
    """Adds the choice of the prompts' wordings (see `harness`)."""
    group.add_argument(
        "--prompts",
        choices=("own", "official"),
        default="own",
        help="own: wordings of this project; official: read from the installed lm_eval package "
        "(default: own)",
    )


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


def parse_names(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Reads names that are separated by commas.

    Raises:
        UserError: naming an unknown one, or one given twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    what = option.removeprefix("--").removesuffix("s")
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown {what} {name!r}; known are {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"{option}: {name} is given twice")
    return names


def chosen_policies(policies: Sequence[PolicyText] | None) -> tuple[PolicyText, ...]:
    """The policies of a run, the default ones if none was named.

    Raises:
        UserError: if two of them have the same label.
    """
    chosen = tuple(policies or (PolicyText(name) for name in DEFAULT_POLICIES))
    labels = [policy.label.lower() for policy in chosen]
    for policy in chosen:
        # Lower case: the labels are folder names, and some file systems do not tell case apart.
        if labels.count(policy.label.lower()) > 1:
            raise UserError(f"--policy {policy.label}: given twice")
    return chosen
