"""Rows of files and datasets, and the checks of what their columns hold.

Every doubt about a value is a DataError. `where` is the place that the error names, such as
"problems.jsonl, line 3".
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import math
import numbers
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NoReturn

from opsdc.config.places import here, is_local
from opsdc.data.text import text_fault
from opsdc.errors import ConfigError, DataError

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
"""These endings of `data.source`, and each with .gz behind it, name a file; any other source is a
dataset."""

PROMPT_COLUMNS = ("messages", "prompt", "problem", "question")
"""The prompt is looked for in these columns, in this order, unless one is named."""

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
"""The answer is looked for in these columns, in this order, unless one is named."""

_ROLES = ("system", "user", "assistant")
"""No other role may pass, because templates write roles next to control tokens."""


def file_type(path: Path) -> str:
    """Return the ending that says how a file is read, without .gz; another one where it is none."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def files_of(source: str | Sequence[str]) -> list[Path]:
    """List the files of a source: one, those a pattern such as data/*.jsonl matches, or of a list.

    It is empty for a dataset. Raises DataError for a pattern that matches nothing, and for a list
    with another thing than files.
    """
    files: list[Path] = []
    for name in [source] if isinstance(source, str) else source:
        path = here(name)
        if file_type(path) not in FILE_TYPES:
            if isinstance(source, str):
                return []
            raise DataError(f"data.source: of a list each must be a file, '{name}' is none")
        matched = [path]
        if glob.has_magic(name) and not path.exists():
            matched = sorted(map(Path, glob.glob(str(path), recursive=True)))
            if not matched:
                raise DataError(f"data.source {name}: no file matches")
        files += matched
    return files


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a .jsonl, .json, .csv or .parquet file, each with its number from 1.

    The number is the line's in a .jsonl file. Any of them may be compressed (.gz). Raises DataError
    for a file that is missing or not readable as its ending says.
    """
    kind = file_type(path)
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            if kind == ".parquet":
                yield from enumerate(_parquet(file, path), 1)
            elif kind == ".json":
                yield from enumerate(_json_array(file.read(), path), 1)
            elif kind == ".csv":
                yield from enumerate(_csv(file, path), 1)
            else:
                # Bytes end lines at \n alone; text mode would also at characters inside strings.
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _parse_json(line, f"{path}, line {number}")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; check data.source") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_dataset(source: str, split: str, options: Mapping[str, Any]) -> Iterator[Any]:
    """Return the rows of a Hub dataset or of a local folder, through `datasets.load_dataset`.

    Raises DataError for a source that does not load, ConfigError for a reserved option.
    """
    path = here(source)
    if path.is_file():
        raise DataError(f"data.source {source}: files must end in {', '.join(FILE_TYPES)}")
    if is_local(source) and not path.is_dir():
        raise DataError(f"data.source {source}: there is no such file or folder")
    if reserved := {"path", "split"} & set(options):
        raise ConfigError(f"data.options {sorted(reserved)}: use data.source and data.split")
    import datasets

    try:
        dataset = datasets.load_dataset(str(path), split=split, **options)
    except Exception as error:  # Network, name, split and options fail in many different ways.
        raise DataError(
            f"data.source {source}, split {split}: datasets.load_dataset failed: {error}; check "
            "the name, data.split, data.options and the network, or give a file that ends in "
            f"{', '.join(FILE_TYPES)}"
        ) from error
    return iter(dataset)


def column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """Return the value of a column, or None.

    A dot in the name leads into a nested column, which may be JSON text, unless a column has the
    dot in its own name. Raises DataError for text that begins as JSON and is none.
    """
    if name in row or "." not in name:
        return row.get(name)
    outer, inner = name.split(".", 1)
    nested, place = row.get(outer), f"{where}, column {outer}"
    if isinstance(nested, str) and nested.lstrip().startswith("{"):
        nested = _json_text(nested, "an object", place)
    return column(nested, inner, place) if isinstance(nested, Mapping) else None


def pick(
    row: Mapping[str, Any], named: str | None, usual: Sequence[str], what: str, where: str
) -> tuple[str, Any]:
    """Return name and value of the named column, else of the first usual one with a value.

    `what` is the column's purpose, as in the setting `data.{what}_column`. Raises DataError,
    listing the columns that exist, where there is no value.
    """
    for name in [named] if named is not None else usual:
        value = column(row, name, where)
        if value is not None:
            return name, value
    wanted = f"'{named}'" if named is not None else "any of " + ", ".join(usual)
    raise DataError(
        f"{where} has no {what}: no value in {wanted}; its columns are "
        f"{', '.join(map(str, row)) or 'none'}. Set data.{what}_column to the one that holds it"
    )


def text(value: Any, where: str) -> str:
    """Return a value that must be a non-empty text of characters that tokenizers take.

    Raises DataError for anything else.
    """
    if not isinstance(value, str):
        _wrong(value, "text", where)
    if fault := text_fault(value):
        raise DataError(f"{where} holds {fault}; remove it from the data")
    if not value.strip():
        raise DataError(f"{where} is empty; give a text or remove the row")
    return value


def chat(value: Any, where: str) -> tuple[dict[str, str], ...]:
    """Return a chat: a text as one user turn, or a list of turns up to its last user turn.

    The list may be JSON text. Raises DataError for other types and roles, and where no user turn is
    left at the end.
    """
    if isinstance(value, str) and _CHAT_TEXT.match(value):
        value = _json_text(value, "a list of messages", where)
    if isinstance(value, str):
        return ({"role": "user", "content": text(value, where)},)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        _wrong(value, "text or a list of messages", where)
    turns = []
    for i, turn in enumerate(value):
        place = f"{where}, message {i + 1}"
        if not isinstance(turn, Mapping):
            _wrong(turn, "an object with role and content", place)
        if turn.get("role") not in _ROLES:
            raise DataError(f"{place}: role must be one of {_ROLES}, not {turn.get('role')!r}")
        content = text(turn.get("content"), f"{place}, content")
        turns.append({"role": str(turn["role"]), "content": content})
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{where} has no user turn at its end (assistant turns there are dropped)")
    return tuple(turns)


_CHAT_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content)['"]\s*:""")
"""A text that begins as a list of messages does: stored as JSON, or as Python prints it."""


def _json_text(value: str, expected: str, where: str) -> Any:
    try:
        return _parse_json(value.encode("utf-8", "surrogatepass"), where)
    except DataError as error:
        raise DataError(
            f"{where} looks like {expected} written as text, but is not JSON; store {expected} or "
            "its JSON"
        ) from error


def number_or_text(value: Any, where: str) -> str:
    """Return a text, or a finite number as text; raise DataError for anything else.

    70.0 becomes "70", because a column with gaps turns integers into floats.
    """
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise DataError(f"{where} is {value}; give a number, a text or nothing")
        if isinstance(value, Decimal):
            return format(value.normalize(), "f")
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if not isinstance(value, str):
        _wrong(value, "text or a number", where)
    return text(value, where)


def _wrong(value: Any, expected: str, where: str) -> NoReturn:
    """Raise the DataError for a value of another type, with its first 80 characters."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    raise DataError(f"{where} must be {expected}, not {type(value).__name__}: {shown}")


def _parse_json(raw: bytes, where: str) -> Any:
    """Parse JSON, with or without a byte order mark; refuse duplicate keys, NaN and Infinity."""
    try:
        return json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 at byte {error.start}; convert the file") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} (line {error.lineno}, column {error.colno}); a .jsonl "
            "file has one object per line, a .json file one array of objects"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable as JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return mapping


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _csv(file: IO[bytes], path: Path) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a file whose first one names the columns; an empty cell holds nothing."""
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names) or not all(names):
            raise DataError(f"{path}: its first row must name each column once, not {names}")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: the row has more or fewer cells than its "
                    f"{len(names)} columns; put texts with commas in double quotes"
                )
            yield {name: cell or None for name, cell in row.items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; convert the file") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _json_array(raw: bytes, path: Path) -> list[Any]:
    rows = _parse_json(raw, str(path))
    if not isinstance(rows, list):
        raise DataError(
            f"{path} must hold an array of objects, not {type(rows).__name__}; one object per "
            "line goes into a .jsonl file"
        )
    return rows


def _parquet(file: IO[bytes], path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Any] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a usable Parquet file: {error}") from error
    return rows
