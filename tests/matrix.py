"""Run the tests of single parts with other versions of the packages that this project stands on.

    python tests/matrix.py                  all rows, some minutes each; rewrites the docs' table
    python tests/matrix.py --only newest

A row's packages are laid over the installed ones (`pip install --target`), without touching them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
ROWS = {
    "pinned": [],
    "newest": ["transformers==5.24.0"],
    "oldest": ["transformers==5.0.0", "tokenizers==0.22.2", "huggingface-hub==1.33.0", "httpx"],
}
"""Packages by the name of a row; all others are as constraints-cpu.txt has them."""
SHOWN = ("torch", "transformers", "tokenizers", "peft", "trl")


def run(packages: list[str]) -> str:
    """Run the tests with packages over the installed ones, and return pytest's last line."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        if packages:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
            # Of transformers alone what it asks for would bring another torch.
            subprocess.run([*pip, "--no-deps", *packages[:1]], check=True)
            if packages[1:]:
                subprocess.run([*pip, *packages[1:]], check=True)
        path = os.pathsep.join((folder, str(ROOT)))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2",
             "--dist", "loadgroup", "-m", "not whole", "tests/trainer"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
        return done.stdout.strip().splitlines()[-1].strip("= ")


def row(name: str, packages: list[str], said: str) -> str:
    """Write a row of the docs' table."""
    given = dict(x.split("==") for x in packages if "==" in x)
    versions = [given.get(name, version(name)) for name in SHOWN]
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed)", said))
    return f"| {name} | {' | '.join(versions)} | {counts} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/matrix.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=ROWS, help="one row; the docs stay as they are")
    options = parser.parse_args()
    names = [options.only] if options.only else [*ROWS]
    rows = [row(name, ROWS[name], run(ROWS[name])) for name in names]
    table = "\n".join([
        f"| | {' | '.join(SHOWN)} | tests |",
        "|---" * (len(SHOWN) + 2) + "|",
        *rows,
    ])  # fmt: skip
    print(table)
    if not options.only:
        text = PAGE.read_text("utf-8")
        mark = r"(<!-- matrix -->\n).*?(\n<!-- end: matrix -->)"
        PAGE.write_text(re.sub(mark, rf"\g<1>{table}\g<2>", text, flags=re.S), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
