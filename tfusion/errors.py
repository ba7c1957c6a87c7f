"""How a user's mistake reaches the user: one line, exit status 1, no traceback."""

import _thread
import contextlib
import errno
import logging as stdlib_logging
import os
import sys
import threading
import traceback
import warnings

from absl import app, flags, logging

PREEMPTED, HUNG = 42, 134  # exit statuses: saved and ended; no step ended any more
RESTARTED = (PREEMPTED, HUNG, 137, 139, 143)  # by launchers, up to their maximum; killed, segfault, terminated


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, where, what to do."""

    status = 1  # the process's: never restarted


class Stopped(UserError):
    """SIGTERM or a preemption notice ended what the same command goes on with."""

    status = PREEMPTED


class Interrupted(Stopped):
    """The user did, by Ctrl-C."""

    status = 1


class Unreachable(UserError):
    """Storage that did not answer, which may answer the next attempt."""

    status = HUNG


# Of storage that did not answer: numbers of the system; words in tensorstore's texts; aiohttp's kinds.
NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
NO_ANSWER_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", *map(os.strerror, NO_ANSWER))
NO_ANSWER_KINDS = ("ConnectionError", "TimeoutError", "ClientConnectionError", "ClientPayloadError")


def unanswered(error: BaseException | None) -> bool:
    """Whether a file system or a bucket did not answer, which says nothing of what is stored there."""
    while error is not None:
        kinds, code = {kind.__name__ for kind in type(error).__mro__}, getattr(error, "code", None)  # gcsfs's
        busy = isinstance(code, int) and (code in (408, 429) or 500 <= code < 600)
        if (busy or getattr(error, "errno", None) in NO_ANSWER or kinds & {*NO_ANSWER_KINDS}
                or any(word in str(error) for word in NO_ANSWER_WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False


def run(main, words: bool = False) -> None:
    """`app.run(main)` for a verb: UserError and file errors end in one line on stderr.

    words: it takes arguments that are no flags, among the flags: main(list of str).
    """

    def parse(argv):
        with parsing():
            flags.FLAGS.set_gnu_getopt(words)
            return flags.FLAGS(argv)

    def guarded(argv):
        if len(argv) > 1 and not words:
            _fail(f"unexpected argument '{argv[1]}'; flags look like --workdir=DIR (--help lists them)")
        logging.set_verbosity(logging.WARNING)  # orbax is talkative
        _hush_orbax()
        try:
            main(argv[1:]) if words else main()
        except BrokenPipeError:  # `... | head`: who read it has seen enough
            _flush()
            leave(None, 1, "its output was closed")
        except (UserError, OSError) as e:
            _fail(_first(e))
        except Exception as e:
            if leave is _exit:
                raise
            traceback.print_exc()  # before the others are told, and this process ends
            leave(e, 1, f"{type(e).__name__}: {_text(e)}")
        except KeyboardInterrupt:
            _fail(UserError("interrupted; run the same command again to go on from the last checkpoint"))
        error = _flush()
        if error and not isinstance(error, BrokenPipeError):
            _fail(error)

    _print_anything()
    app.run(guarded, flags_parser=parse)


@contextlib.contextmanager
def parsing():
    """A mistake in a flag ends in one line; also for a definition that parses, as ml_collections' do."""
    try:
        yield
    except (AttributeError, KeyError) as e:  # ml_collections, on --config.no.such.key
        _fail(f"unknown config key {_text(e)}")
    except (flags.Error, TypeError, ValueError, SyntaxError, OSError) as e:
        _fail(e)


def _print_anything() -> None:
    """What is printed never stops a verb: a stream that was closed takes it, and one that cannot encode a
    letter prints `?`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")


def _flush() -> OSError | None:
    """Why stdout cannot be written, if so. What is left in it is dropped: at exit Python would try again."""
    try:
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return e


def _hush_orbax() -> None:
    """A checkpoint that cannot be read or written fails at its first array. Orbax leaves the other arrays to
    end as they will, each with a traceback of its own: logged, from asyncio, from a destructor, or for what
    never began. None can be acted upon; the first is raised as well, and becomes the one line.
    """
    logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    sys.unraisablehook = _pass_on_interrupt
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _pass_on_interrupt(unraisable) -> None:
    """Ctrl-C that came in a garbage collector's callback, where no exception can be raised, comes again."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main).start()  # not in here, where it would be lost too


def _first(error):
    """The user's error that began it, where clearing up after it failed too, as on a full disk."""
    while isinstance(error.__context__, UserError) and not error.__suppress_context__:  # `from` says more
        error = error.__context__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}: what was saved before is whole; make room, and the same command goes on"
    return error


def _text(error) -> str:
    """The message, on one line; of a traceback in it (the config file's own error) only the last line."""
    while getattr(error, "args", None) and isinstance(error, KeyError | AttributeError):
        error = error.args[0]  # KeyError's own text is a repr; AttributeError may hold a KeyError
    head, trace, rest = str(error).partition("Traceback (most recent call last):")
    return " ".join((head + rest.strip().splitlines()[-1] if trace else head).split())


def _fail(error) -> None:
    print(_text(error) if isinstance(error, Stopped) else f"error: {_text(error)}", file=sys.stderr)
    threading.excepthook = lambda _: None  # a writer's thread that is cut off has nothing to add
    _flush()
    status = HUNG if isinstance(error, OSError) and unanswered(error) else getattr(error, "status", 1)
    leave(error, status, _text(error))


def _exit(error, status: int, text: str) -> None:
    sys.exit(status)


leave = _exit  # (error, status, message): ends the process; of several, distributed.py's
