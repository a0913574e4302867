"""Errors a person at the command line can act on."""


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message is one line: what was given, what is wanted, what to do. The command line prints it on stderr and exits
    with status 2.
    """


class NonFiniteError(UserError):
    """A NaN or an infinity appeared where training needs a finite number."""


class DoesNotFitError(UserError):
    """A step, or the guidance's weights, do not fit into memory with everything saved that can be.

    The run is as it was before.
    """
