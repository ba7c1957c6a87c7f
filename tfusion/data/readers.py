"""ArrayRecord files, read at random and by several threads; and what is done where a disk that is far fails."""

import collections
import sys
import threading
import time
from collections.abc import Callable, Hashable

from array_record.python.array_record_module import ArrayRecordReader

from tfusion.errors import unanswered

OPEN = 64  # files at once
PAUSES = (0.5, 2.0)  # seconds, before the second and the third try
OPTIONS = "readahead_buffer_size:0"  # records are read at random


def tried(path, read: Callable, forget: Callable[[], object] = lambda: None):
    """What read() returns. Where the disk does not answer (errors.unanswered), or ArrayRecord fails
    (RuntimeError: it does not say why), it is called twice more, each after a line on stderr, forget() and a
    pause. Raises what the last one raises, and anything else at once."""
    for pause in PAUSES:
        try:
            return read()
        except (RuntimeError, OSError) as e:
            if isinstance(e, OSError) and not unanswered(e):
                raise
            print(f"warning: {path} cannot be read ({e}): again in {pause:g} s", file=sys.stderr)
            forget()
            time.sleep(pause)
    return read()


class Readers:
    """open_file: (name) -> a reader (`reader_of`); raises where the file is not as it should be. The file that
    was used longest ago is closed where too many are open."""

    def __init__(self, open_file: Callable[[Hashable], ArrayRecordReader]):
        self._open, self._lock = open_file, threading.Lock()
        self.kept: collections.OrderedDict = collections.OrderedDict()  # name -> (reader, its lock)

    def read(self, name: Hashable, records: list[int]) -> list[bytes]:
        """Some records of a file, in the order asked for, in one read: on a disk that is far it waits once
        where one by one it would wait for each (docs/LOG.md). Raises RuntimeError or ValueError where one is
        damaged."""
        reader, lock = self._reader(name)
        with lock:
            return reader.read(records) if records else []

    def forget(self, name: Hashable) -> None:
        """It is opened anew by the next one who reads it."""
        with self._lock:
            self.kept.pop(name, None)

    def _reader(self, name: Hashable):
        with self._lock:
            if name not in self.kept:
                self.kept[name] = self._open(name), threading.Lock()
            self.kept.move_to_end(name)
            while len(self.kept) > OPEN:
                self.kept.popitem(last=False)  # closed when its last reader is done with it
            return self.kept[name]


def reader_of(path) -> ArrayRecordReader:
    """Ask its `ok()`: of a file that is missing or cut the library says only that it holds nothing."""
    return ArrayRecordReader(str(path), OPTIONS)
