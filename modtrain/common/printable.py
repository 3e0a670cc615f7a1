"""Text from outside, such as names in files, that a terminal may show."""


def printable(text: str) -> str:
    """Return ``text`` with an escape for each character that a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
