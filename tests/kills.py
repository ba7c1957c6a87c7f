"""A process that ends in the middle, as by kill -9, played within this one."""

import os
from collections.abc import Callable
from unittest import mock

CHANGES = ("mkdir", "remove", "rename", "replace", "rmdir", "unlink")  # of os; pathlib and shutil call them


class Killed(BaseException):
    pass


def killed_at(change: int, call: Callable[[], None]) -> bool:
    """Calls a function until it would change the file system once more than so many times; nor does it change
    anything while it unwinds. Returns whether it was killed, and did not end before."""
    left, mkdir = change, os.mkdir

    def guarded(real):
        def one(*args, **named):
            nonlocal left
            left -= not (real is mkdir and os.path.isdir(args[0]))  # that is no change
            if left < 0:
                raise Killed
            return real(*args, **named)

        return one

    with mock.patch.multiple(os, **{name: guarded(getattr(os, name)) for name in CHANGES}):
        try:
            call()
        except Killed:
            return True
    return False
