"""What opening costs, in bytes for each record: a hundred million lines must fit."""

import json
import tracemalloc

import pytest

from tests.data.sources.test_array_record import write
from tfusion.data.sources.array_record import ArrayRecordSource
from tfusion.data.sources.folder import FolderSource
from tfusion.data.sources.jsonl import JsonlSource

RECORDS = 800


def lines(root, fraction):
    (root / "a.jsonl").write_text("".join(f'"text {i}"\n' for i in range(RECORDS)))
    return JsonlSource("jsonl", 1.0, str(root / "a.jsonl"), fraction)


def array_records(root, fraction):
    write(root / "a.array_record", *(f"text {i}" for i in range(RECORDS)))
    return ArrayRecordSource("array_record", 1.0, str(root), "none", fraction)


def photos(root, fraction):
    for i in range(RECORDS):
        for end in ("jpg", "txt"):
            (root / f"picture-{i:09d}.{end}").touch()
    return FolderSource("folder", 1.0, str(root), fraction)


def table(root, fraction):
    names = [f"picture-{i:09d}.jpg" for i in range(RECORDS)]
    for name in names:
        (root / name).touch()
    (root / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": name, "text": f"a caption of fifty letters, as they are: {name}"}) + "\n"
        for name in names))
    return FolderSource("folder", 1.0, str(root), fraction)


@pytest.mark.parametrize("make, fraction, most", [
    (lines, 0.01, 80), (array_records, 0.01, 40), (array_records, 0.0, 8), (photos, 0.01, 500),
    (table, 0.01, 800)])
def test_bytes_for_each_record(tmp_path, make, fraction, most):
    spec = make(tmp_path, fraction)
    spec.open("heldout")  # imports, and what is kept between calls
    tracemalloc.start()
    try:
        opened = spec.open("train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(opened) > 0.9 * RECORDS and peak < most * RECORDS
