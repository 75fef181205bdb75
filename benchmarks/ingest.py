"""Time and memory of a whole collection's table before the first pixel: `python benchmarks/ingest.py TABLE`.

TABLE is `Data_Entry_2017_v2020.csv` of NIH ChestX-ray14, packed or not: 112,120 rows. Every image that it names is
stubbed by an empty file, so that reading the table, matching files, label policy, patient split and all checks run as
they do in `prepare --dry-run`, and nothing is decoded.
"""

import argparse
import csv
import gzip
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from processes import Peak, alone

from pipeline.prepare_config import PrepareConfig
from pipeline.shards import survey


class Measured(NamedTuple):
    """What a survey found and took."""

    images: dict[str, int]
    """Split -> images."""
    patients: int
    seconds: float
    mib: float
    """Peak of the process, the interpreter and its libraries included."""


def stub(table: Path, root: Path) -> int:
    """Lays the collection out below `root` with empty images; their number."""
    (root / "images").mkdir()
    shutil.copy(table, root)
    content = gzip.decompress(table.read_bytes()) if table.suffix == ".gz" else table.read_bytes()
    names = [row["Image Index"] for row in csv.DictReader(io.StringIO(content.decode()))]
    for name in names:
        (root / "images" / name).touch()
    return len(names)


def measure(root: str) -> Measured:
    """Source, policy and split in this process."""
    peak, start = Peak(), time.perf_counter()
    peak.start()
    found = survey(PrepareConfig(source="nih"), root)
    seconds = time.perf_counter() - start
    images: dict[str, int] = {name: counts.images for name, counts in found.counts.items()}
    return Measured(images, len(set(found.manifest["patient_id"].to_pylist())), seconds, peak.end())


def main() -> None:
    """Prints one line: images a split, patients, seconds, peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        rows = stub(parser.parse_args().table, Path(folder))
        found = alone(measure, folder)
    splits = ", ".join(f"{name} {images:,}" for name, images in found.images.items())
    print(f"{rows:,} rows, {found.patients:,} patients: {splits}; {found.seconds:.1f} s, peak {found.mib:.0f} MiB")


if __name__ == "__main__":
    main()
