"""Problems from a file of rows."""

from __future__ import annotations

import json
from pathlib import Path

from opsdc.data.problem import ProblemSet
from opsdc.data.sources import load_problems


def load(source, **settings_) -> ProblemSet:
    options = {
        "split": None,
        "options": {},
        "prompt_column": None,
        "answer_column": None,
        "seed": 0,
        **settings_,
    }
    return load_problems(source if isinstance(source, list) else str(source), **options)


def written(folder: Path, rows: list, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
