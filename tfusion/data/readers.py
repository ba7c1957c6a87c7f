"""ArrayRecord files, read at random and by several threads."""

import collections
import threading
from collections.abc import Callable, Hashable

from array_record.python.array_record_module import ArrayRecordReader

OPEN = 64  # files at once
OPTIONS = "readahead_buffer_size:0"  # records are read at random


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
