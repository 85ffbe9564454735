"""The official wordings, read from the files of the installed `lm_eval` package.

Its modules for RULER import much, and download when they are imported: they are parsed instead,
and what they hold as constants, or spell out where a prompt is put together, is taken as it stands
there. Two things to know of it:

- It draws a worked example for `cwe`, counts its tokens, and then asks without it. The benchmark's
  own scripts show it, and so do these wordings.
- Without a chat template, an empty line separates the question of `cwe` from the beginning of its
  answer, and a space those of the other tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.core.harness import read_task, task_folder, unreadable
from experiments.ruler.modules import Module, with_fields
from experiments.ruler.wordings import (
    Asking,
    ListWording,
    NeedleWording,
    PassageWording,
    TrackingWording,
    Wordings,
)

_PLURAL = {"type_needle_v": "{kind}s", "query": "{query}", "context": "{context}"}
_SINGULAR = {**_PLURAL, "type_needle_v": "{kind}"}


def official_wordings() -> Wordings:
    """The official wordings of all 13 tasks.

    Raises:
        UserError: `lm_eval` is missing, or does not hold them where and as version 0.4.13 does.
    """
    return Wordings(niah=_niah(), vt=_vt(), cwe=_cwe(), fwe=_fwe(), qa=_qa())


def _niah() -> NeedleWording:
    delimiter = _delimiter("niah_single_1.yaml")
    with _reading("prepare_niah.py") as path:
        module = Module(path)
        fields = {"type_needle_v": "{kind}s", "key": "{key}", "value": "{value}"}
        needle = with_fields(module.constant("NEEDLE"), fields)
        noise = module.local("get_haystack", "haystack")
        singular = module.replacements("generate_input_output", "template")
        fields = {**_PLURAL, "type_needle_v[:-1]": "{kind}"}
        prefixes = module.choice("generate_samples", "gen_prefix", fields)
    with _reading("niah_utils.py") as path:
        template = Module(path).constant("TEMPLATE")
        several = _needle_asking(template, prefixes[1], _PLURAL, delimiter)
        for old, new in singular:
            template = template.replace(old, new)
        one = _needle_asking(template, prefixes[0], _SINGULAR, delimiter)
        return NeedleWording(one=one, several=several, needle=needle, noise=noise, last=", and ")


def _needle_asking(template: str, prefix: str, fields: Mapping[str, str], delimiter: str) -> Asking:
    return Asking(
        template=with_fields(template, fields),
        prefix=prefix,
        delimiter=delimiter,
    )


def _vt() -> TrackingWording:
    delimiter = _delimiter("vt.yaml")
    with _reading("vt_utils.py") as path:
        module = Module(path)
        template, prefix = (
            module.constant("CONFIG", "variable_tracking", key)
            for key in ("template", "answer_prefix")
        )
        # A blank line ends the example there, and another one is put after it.
        asking = _asking(template, prefix, delimiter, example=" {answer}\n\n\n\n")
        noise = module.local("generate_input_output", "noise")
        first, then = module.f_strings("generate_chains", (2, 2))
        return TrackingWording(asking=asking, noise=(noise,), first=first, then=then)


def _cwe() -> ListWording:
    delimiter = _delimiter("cwe.yaml")
    with _reading("cwe_utils.py") as path:
        module = Module(path)
        asking = _asking(*_config(module), delimiter, example="{answer}\n")
        (item,) = module.f_strings("get_example", (2,))
        return ListWording(asking=asking, item=item)


def _fwe() -> Asking:
    delimiter = _delimiter("fwe.yaml")
    with _reading("fwe_utils.py") as path:
        return _asking(*_config(Module(path)), delimiter)


def _qa() -> PassageWording:
    delimiter = _delimiter("qa_squad.yaml")
    with _reading("qa_utils.py") as path:
        module = Module(path)
        fields = {"i": "{number}", "document": "{text}"}
        passage = with_fields(module.constant("DOCUMENT_PROMPT"), fields)
        return PassageWording(asking=_asking(*_config(module), delimiter), passage=passage)


def _config(module: Module) -> tuple[str, str]:
    return module.constant("CONFIG", "template"), module.constant("CONFIG", "answer_prefix")


def _asking(template: str, prefix: str, delimiter: str, *, example: str | None = None) -> Asking:
    """The package strips the answer's beginning when it asks, but not in a worked example.

    Args:
        template: its template.
        prefix: how its answers begin.
        delimiter: from `_delimiter`.
        example: what follows the latter in the example, if there is one.
    """
    fields = {"context": "{context}", "query": "{query}", "num_v": "{count}"}
    stripped = prefix.strip()
    lead, _, trail = prefix.partition(stripped)
    return Asking(
        template=with_fields(template, fields),
        prefix=with_fields(stripped, fields),
        delimiter=delimiter,
        example=None if example is None else f"{{asked}}{lead}{{prefix}}{trail}{example}",
    )


def _delimiter(file: str) -> str:
    """What separates question and answer's beginning in a task's settings."""
    with _reading(file) as path:
        delimiter = read_task(path).get("target_delimiter")
        if not isinstance(delimiter, str):
            raise ValueError(f"target_delimiter: expected a string, found {delimiter!r}")
        return delimiter


@contextlib.contextmanager
def _reading(file: str) -> Iterator[Path]:
    try:
        yield task_folder("ruler") / file
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(f"the wordings in {file}", error) from error
