"""Tables for people: by rich where it is installed, else as aligned plain text.

A result that is to be printed derives from :class:`Printable` and says what its tables are.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Printable", "Table", "as_bytes", "as_sizes"]

_WIDTH = 160  # where there is no terminal


def as_bytes(count: int) -> str:
    """``1536 -> '1.5 KiB'``."""
    if count < 1024:
        return f"{count} B"
    power = min(3, (count.bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def as_sizes(sizes: Sequence[int]) -> str:
    """``(2, 197, 192) -> '2x197x192'``."""
    return "x".join(map(str, sizes))


@dataclass
class Table:
    """A title, columns and rows of strings.

    Attributes:
        right: the columns whose cells are numbers.
    """

    title: str
    columns: Sequence[str]
    right: frozenset[str] = frozenset()
    rows: list[list[str]] = field(default_factory=list)

    def to_text(self) -> str:
        """Aligned columns, two spaces between them."""
        lines = [list(self.columns), *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        out = [self.title]
        for k, line in enumerate(lines):
            cells = [
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ]
            out.append("  ".join(cells).rstrip())
            if k == 0:
                out.append("  ".join("-" * width for width in widths))
        return "\n".join(out)

    def to_rich(self) -> Any:
        """A ``rich.table.Table``."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for column in self.columns:
            table.add_column(
                column, justify="right" if column in self.right else "left", overflow="fold"
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))  # names may look like markup
        return table


class Printable:
    """A result that prints as tables and lines below them."""

    def tables(self) -> list[Table]:
        """The tables, in order; those without rows are left out."""
        raise NotImplementedError

    def summary(self) -> list[str]:
        """Lines below the tables."""
        raise NotImplementedError

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(
            *(table.to_rich() for table in self.tables() if table.rows), *map(Text, self.summary())
        )

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            parts = [table.to_text() for table in self.tables() if table.rows]
            return "\n\n".join([*parts, "\n".join(self.summary())])
        stream, width = io.StringIO(), shutil.get_terminal_size((_WIDTH, 50)).columns
        # In a notebook rich would display the tables by itself, and write nothing to the stream.
        Console(file=stream, width=width, force_jupyter=False).print(self)
        return stream.getvalue().rstrip("\n")
