"""Tables as text, for a terminal."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str] | str], left: int = 1, indent: int = 0) -> str:
    """Cells in columns, two spaces apart, as wide as their widest line; nothing trails at the end of a line.

    Args:
        rows: Each a sequence of cells, the same number in all; the first one may be the header. A cell of several lines
            goes on under its own column. A text in place of the cells is a heading: it stands alone, after an empty
            line.
        left: Number of columns, from the first, that are flush left; the others are flush right.
        indent: Spaces before the first column.
    """
    split = [row if isinstance(row, str) else [cell.split("\n") for cell in row] for row in rows]
    columns = zip(*(row for row in split if not isinstance(row, str)), strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]

    def lines(row: list[list[str]]):
        for i in range(max(map(len, row))):
            cells = [cell[i] if i < len(cell) else "" for cell in row]
            aligned = [
                f"{cell:{'<' if column < left else '>'}{width}}"
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            yield (" " * indent + "  ".join(aligned)).rstrip()

    return "\n".join(line for row in split for line in (["", row] if isinstance(row, str) else lines(row)))


def shorten(text: str, width: int = 36) -> str:
    """The text; if it is longer than `width` characters, its beginning and an ellipsis."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
