"""The way in which slow code reports its progress to the user, without knowing about terminals."""

from collections.abc import Callable

# A function that takes one line for the user.
Note = Callable[[str], None]
