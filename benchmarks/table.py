"""One plain table: reads in a terminal and in Markdown."""

from collections.abc import Callable, Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table, columns padded to one width."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def growing(header: Sequence[str], show: Callable[[str], None]) -> Callable[[Sequence[object]], None]:
    """Show the head of a Markdown table, and return what shows a row: what is stopped early leaves its first rows."""

    def add(row: Sequence[object]) -> None:
        show("| " + " | ".join(map(str, row)) + " |")

    add(header)
    show("|---" * len(header) + "|")
    return add
