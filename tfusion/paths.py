"""Paths as a user writes them, in flags and in the config.

`Path("~/run")` is a folder of the name `~`, and `Path("gs://bucket/run")` one of the name `gs:`. Here `~` is
the home folder, and a URL is refused.
"""

import os
import re

from absl import flags

from tfusion.errors import UserError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

flags.disclaim_key_flags()  # `--help` of a verb lists its path flags among its own


def local(text: str) -> str:
    """The path with `~` expanded. Raises UserError where it names nothing on this machine."""
    if URL.match(text):
        raise UserError("cloud paths and URLs are not supported yet; use a local path")
    if not text.strip() or "\0" in text:
        raise UserError("a path is needed")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError("no such home folder is known here; write the path in full (./~ for that name itself)")
    return path


class _Parser(flags.ArgumentParser):
    def parse(self, argument):
        return local(argument)


def define(name: str, default: str | None, help: str, **args):
    """A flag that holds a path: `flags.DEFINE_string` with `local` applied."""
    return flags.DEFINE(_Parser(), name, default, help, serializer=flags.ArgumentSerializer(), **args)


def define_multi(name: str, default: list[str], help: str):
    """The same for a flag that may be repeated."""
    return flags.DEFINE_multi(_Parser(), flags.ArgumentSerializer(), name, default, help)
