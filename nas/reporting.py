"""Reports to the user: the type of the function that takes lines of progress, and the style of tables."""

from collections.abc import Callable

from rich.table import Table

# A function that takes one line for the user: slow code reports its progress without knowing about terminals.
Note = Callable[[str], None]


def console_table(title: str) -> Table:
    """An empty table for the terminal, with a title above and no frame around it."""
    return Table(title=title, title_justify="left", show_edge=False, padding=(0, 0, 0, 1))
