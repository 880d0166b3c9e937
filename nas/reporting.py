"""How code that takes a while tells its user what it does, without knowing of terminals."""

from collections.abc import Callable

# Takes one line for the user.
Note = Callable[[str], None]
