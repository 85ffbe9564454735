"""The tables at the end of a run, for the terminal, for a log file and as Markdown."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

# More policies than these have a line each; only their differences to the first one are printed.
_FEW = 6


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table as text: a title, column names, and rows of cells (the first cell is the name)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def policy_table(
    title: str,
    names: Sequence[str],
    policies: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> TextTable:
    """A table with a column for each policy, or, where these would be too many, with a line.

    Args:
        title: of the table.
        names: of the columns before those of the policies.
        policies: their labels.
        rows: what stands in the columns.
    """
    columns = (*names, *policies)
    if len(policies) <= _FEW:
        return TextTable(title, columns, tuple(map(tuple, rows)))
    heads, *lines = zip(columns, *rows, strict=True)
    return TextTable(title, ("policy", *heads[1:]), tuple(lines))


def score_table(title: str, result: Mapping[str, Any], digits: int = 2) -> TextTable:
    """Set x policy: score and standard error; then the averages.

    Args:
        title: what the scores are. Scores of the offline suite must not be called LongBench's.
        result: the content of `result.json`.
        digits: decimals.
    """
    policies = list(result["score"])
    rows = []
    for name, n in result["n"][policies[0]].items():
        cells = [
            _score(result["score"][p][name], result["standard_error"][p][name], digits)
            for p in policies
        ]
        rows.append((name, str(n), *cells))
    for name, average in result["averages"].items():
        cells = [
            _score(average["score"][p], average["standard_error"][p], digits) for p in policies
        ]
        rows.append((name, "", *cells))
    return policy_table(title, ("set", "n"), policies, rows)


def difference_table(
    result: Mapping[str, Any],
    of: Literal["sets", "averages"],
    digits: int = 2,
    *,
    against: str | None = None,
) -> TextTable:
    """What each policy gains on each earlier one on the same rows, with the interval.

    Args:
        result: the content of `result.json`.
        of: differences of each set, or of the averages.
        digits: decimals.
        against: the only policy that the others are held against; None holds all against all.
    """
    pairs = [pair for pair in result["paired"] if against in (None, pair["against"])]
    rows = [
        (
            name,
            f"{pair['policy']} - {pair['against']}",
            str(entry["n"]),
            *_difference(entry, digits),
        )
        for name in (pairs[0][of] if pairs else ())
        for pair in pairs
        for entry in (pair[of][name],)
    ]
    columns = ("set", "policies", "n", "difference", "95 % interval")
    title = f"paired differences, {of}"
    return TextTable(title if against is None else f"{title}, to {against}", columns, tuple(rows))


def printed_differences(result: Mapping[str, Any], digits: int = 2) -> list[TextTable]:
    """The differences that a terminal has room for, none for a single policy.

    Those of the averages where there are some, and only those to the first policy where there are
    many policies.
    """
    if not result["paired"]:
        return []
    of: Literal["averages", "sets"] = "averages" if result["averages"] else "sets"
    policies = list(result["score"])
    against = policies[0] if len(policies) > _FEW else None
    return [difference_table(result, of, digits, against=against)]


def cost_table(timings: Mapping[str, Sequence[Mapping[str, Any]]]) -> TextTable:
    """Policy x what it costs: mean kept slots and cache bytes, median times over the rows.

    Medians, because the first row of each shape includes compilation.

    Args:
        timings: policy -> its timing rows.
    """
    rows = []
    for policy, entries in timings.items():
        if not entries:
            rows.append((policy, *["-"] * 5))
            continue
        per_token = [e["decode_s"] / e["new_tokens"] for e in entries if e["new_tokens"]]
        token_s = statistics.median(per_token) if per_token else 0.0
        rows.append(
            (
                policy,
                f"{statistics.fmean(e['kept_slots'] for e in entries):.1f}",
                human_bytes(statistics.fmean(e["cache_bytes"] for e in entries)),
                f"{statistics.median(e['prefill_s'] for e in entries):.3f}",
                f"{1000 * token_s:.2f}",
                f"{1 / token_s:.1f}" if token_s else "-",
            )
        )
    columns = ("policy", "kept slots", "cache", "prefill s", "decode ms/token", "tokens/s")
    together = max(
        (e.get("decoded_with", 1) for entries in timings.values() for e in entries), default=1
    )
    title = "cost per prompt"
    if together > 1:
        title += f"; up to {together} caches are decoded at once, which share the time by tokens"
    return TextTable(title, columns, tuple(rows))


def human_bytes(count: float) -> str:
    """A number of bytes in the largest binary unit that leaves at least 1: "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_tables(tables: Sequence[TextTable], stream: TextIO | None = None) -> None:
    """Prints tables; where the stream is no terminal, in plain text that never wraps."""
    stream = sys.stdout if stream is None else stream
    terminal = stream.isatty()
    for table in tables:
        drawn = Table(box=None)
        if terminal:
            drawn.box = box.SIMPLE_HEAD
        for i, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in table.rows:
            drawn.add_row(*row)
        needed = sum(
            max(len(r[i]) for r in (table.columns, *table.rows)) + 4
            for i in range(len(table.columns))
        )
        width = None if terminal else max(needed, len(table.title)) + 4
        console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
        console.print(table.title)  # not as the table's own title, which wraps at its width
        console.print(drawn)
        console.print()


def markdown(tables: Sequence[TextTable]) -> str:
    """The tables in Markdown."""
    lines = []
    for table in tables:
        lines += [f"**{table.title}**", ""]
        align = ["---", *["---:"] * (len(table.columns) - 1)]
        for row in (table.columns, align, *table.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines.append("")
    return "\n".join(lines)


def read_markdown(text: str) -> list[TextTable]:
    """The tables that `markdown` wrote, cell by cell.

    Raises:
        ValueError: a line that it does not write.
    """
    tables = []
    for block in text.strip().split("\n\n**"):
        title, _, lines = block.removeprefix("**").partition("**\n\n")
        rows = [_cells(line) for line in lines.splitlines()]
        if len(rows) < 2 or len({len(row) for row in rows}) != 1:
            raise ValueError(f"expected tables as `markdown` writes them, got {block[:80]!r}")
        tables.append(TextTable(title, rows[0], tuple(rows[2:])))
    return tables


def _cells(line: str) -> tuple[str, ...]:
    # Between two cells stands " | "; a bar in a cell has a backslash before it.
    inner = line.removeprefix("| ").removesuffix(" |")
    return tuple(cell.replace("\\|", "|") for cell in inner.split(" | "))


def _score(score: float, error: float | None, digits: int) -> str:
    return f"{score:.{digits}f}" if error is None else f"{score:.{digits}f} ± {error:.{digits}f}"


def _difference(entry: Mapping[str, Any], digits: int) -> tuple[str, str]:
    value, low, high = (
        "-" if entry[key] is None else f"{entry[key]:+.{digits}f}"
        for key in ("difference", "low", "high")
    )
    return value, "-" if low == "-" else f"{low} to {high}"
