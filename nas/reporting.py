"""Reports to the user: the type of the function that takes lines of progress, and the style of tables."""

from collections.abc import Callable, Collection

from rich.table import Table

# A function that takes one line for the user: slow code reports its progress without knowing about terminals.
Note = Callable[[str], None]


def console_table(title: str, *headers: str, text: Collection[str] = ()) -> Table:
    """An empty table for the terminal, without a frame; the columns in `text` are aligned to the left, others right."""
    table = Table(title=title, title_justify="left", show_edge=False, padding=(0, 0, 0, 1))
    for header in headers:
        left = header in text
        table.add_column(header, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    return table
