"""What any run needs and no equation mentions."""


class UserError(Exception):
    """What the user can mend. The message is one printable line: what was found, and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and what it counts: `1 image`, `2 images`; `plural` where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def first_line(error: Exception, limit: int = 200) -> str:
    """What an exception says in its first line, at most `limit` characters of it."""
    return (str(error).splitlines() or [""])[0][:limit]


def printable(text: str, limit: int = 600) -> str:
    """`text`, at most `limit` characters of it, in which nothing can steer a terminal: file names may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])
