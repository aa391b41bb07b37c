"""Plain text tables for the terminal."""

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns as wide as their widest cell; columns of numbers are set to the right.

    Parameters
    ----------
    header : sequence of str
    rows : sequence of sequences of str
        As long as the header.

    Returns
    -------
    str
        Without a final line end.

    Examples
    --------
    >>> print(format_table(("name", "f1"), [("a", "0.5"), ("bc", "0.25")]))
    name    f1
    ----------
    a      0.5
    bc    0.25
    """
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    to_the_right = [
        any(row[column][:1].isdigit() for row in rows) and all(_is_number(row[column]) for row in rows)
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in table
    ]
    rule = "-" * max(sum(widths) + 2 * (len(widths) - 1), 1)
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_number(cell: str) -> bool:
    return cell in ("", "-", "n/a") or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit())
