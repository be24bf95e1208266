"""What a user did can be wrong in many ways; each is told in one line.

A `UserError` names what is wrong, where, the value, and the remedy. The verbs print it and leave with status 2;
nothing else of the project is allowed to look like a traceback to somebody who mistyped a path.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that its message alone lets the user mend: one line, no traceback.

    status: exit status of the verb that it ends; see mcf.exits.
    """

    def __init__(self, message: str, status: int = 2):
        super().__init__(" ".join(str(message).split()))
        self.status = status


def missing_package(package: str, purpose: str, install: str | None = None) -> UserError:
    """The one message for an optional package that is not there."""
    return UserError(f"{package} is not installed, and {purpose} needs it: pip install {install or package}")
