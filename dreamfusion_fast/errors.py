"""Errors a person at the command line can act on."""


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message is one line: what was given, what is wanted, what to do. The command line prints it on stderr and exits
    with status 2.
    """


def printable(text: str) -> str:
    """A text with anything but line breaks that a terminal might obey escaped."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def joined(error: BaseException | str) -> str:
    """All lines of a message as one, `printable`."""
    return printable(" ".join(str(error).split()))


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """The first line of a message, shortened, `printable`."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return joined(text if len(text) <= limit else text[: limit - 3] + "...")


def described(error: BaseException) -> str:
    """The kind of an error and its message, as `one_line`."""
    return one_line(f"{type(error).__name__}: {error}")


def missing_package(error: ModuleNotFoundError, extra: str = "generate") -> str | None:
    """One line that says how to get the package whose import failed; None for a module of this package, a bug.

    Args:
        error: of the import.
        extra: of this package that has it.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "dreamfusion_fast"):
        return None
    return f'{package} is not installed: pip install "dreamfusion-fast[{extra}]"'


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end: Ctrl-C, SIGTERM or SIGHUP.

    Attributes:
        number: of the signal. The command line exits with 128 and this.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class NonFiniteError(UserError):
    """A NaN or an infinity appeared where training needs a finite number."""


class DoesNotFitError(UserError):
    """A step, or the guidance's weights, do not fit into memory with everything saved that can be.

    The run is as it was before.
    """
