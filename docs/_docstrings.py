"""Docstrings as Markdown: examples become code blocks, and Sphinx' roles names in code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`[~.]*([^`]*)`")
_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^(?![ ]*$).*\n?)*)(?:\n(?=[ ]*>>> ))?", re.M)


def as_markdown(docstring: str) -> str:
    """``:class:`~a.b.C``` is ``C``; lines from ``>>>`` to an empty line are a block; and ``::``
    before an indented block, which is one in Markdown, too, is a colon or nothing.
    """
    docstring = re.sub(r"(?<=\S)::$", ":", docstring, flags=re.M)
    docstring = re.sub(r"^ *::\n", "", docstring, flags=re.M)
    docstring = _ROLE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", docstring)
    return _EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", docstring)


class Docstrings(griffe.Extension):
    """Applied to all objects before the site is made of them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
