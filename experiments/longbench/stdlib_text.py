"""Prose and code that every Python installation carries.

The texts belong to the running Python: `pydoc_data` and the standard library's sources change
between versions, so what is made from them is the same on every machine with the same Python,
not across versions. `run_meta.json` records the version and the rows' checksums.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping

from experiments.core.errors import UserError

# Pure-Python modules of long standing; one that a version lacks, or has rebuilt, is left out.
_MODULES = """
argparse calendar cmd configparser copy csv difflib doctest email.message fractions ftplib
functools gettext gzip html.parser http.client http.cookiejar imaplib inspect ipaddress
json.decoder logging mailbox mimetypes optparse pdb pickle pickletools plistlib poplib
pprint random shutil smtplib socketserver statistics subprocess tarfile tempfile textwrap
threading tokenize turtle typing unittest.case unittest.mock urllib.parse urllib.request
uuid weakref xml.dom.minidom
"""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SENTENCE = re.compile(r"[A-Z\"][^*|\\]*[.!?]")


@functools.cache
def prose_sentences() -> tuple[str, ...]:
    """Distinct sentences of the language reference as `help()` has it, in reading order.

    Raises:
        UserError: if this Python comes without them.
    """
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise UserError("the offline suite needs pydoc_data, which this Python lacks") from error
    sentences: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            # Grammar and examples are no prose; most code ends otherwise than a sentence.
            if "::=" in paragraph or ">>>" in paragraph:
                continue
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                if 6 <= len(sentence.split()) <= 40 and _SENTENCE.fullmatch(sentence):
                    sentences[sentence] = None
    return tuple(sentences)


@functools.cache
def code_files() -> dict[str, tuple[str, ...]]:
    """Name of a standard-library module -> the lines of its source.

    Raises:
        UserError: if this Python comes without sources.
    """
    files = {}
    for name in _MODULES.split():
        try:
            spec = importlib.util.find_spec(name)
        except ImportError:
            continue
        source = getattr(spec and spec.loader, "get_source", lambda _: None)(name)
        if source:
            files[name] = tuple(line.rstrip() for line in source.expandtabs(4).splitlines())
    if not files:
        raise UserError("the offline suite needs the standard library's sources, which are missing")
    return files
