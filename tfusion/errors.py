"""How a user's mistake reaches the user: one line, exit status 1, no traceback."""

import logging as stdlib_logging
import sys

from absl import app, flags, logging


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, what to do."""


def run(main) -> None:
    """`app.run(main)` for a verb: UserError and file errors end in one line on stderr."""

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
            _fail(e)

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument '{argv[1]}'; flags look like --workdir=DIR (--help lists them)")
        logging.set_verbosity(logging.WARNING)  # orbax is talkative
        # and leaves the other reads of a broken checkpoint to asyncio, which logs a traceback for each
        stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
        try:
            main()
        except (UserError, OSError) as e:
            _fail(e)
        except KeyboardInterrupt:
            _fail("interrupted; run the same command again to go on from the last checkpoint")

    app.run(guarded, flags_parser=parse)


def _fail(error) -> None:
    text = " ".join(str(error.args[0] if getattr(error, "args", None) and isinstance(error, KeyError)
                        else error).split())
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)
