"""Rows of the user's files, one after the other, each with where it is. A row that cannot be read is given with the
reason; a file that cannot be read is an error."""

from __future__ import annotations

import copy
import difflib
import glob
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npo_core.interfaces import ConfigurationError, first_line
from schemas.data import DataSection

ROWS_AT_ONCE = 256
"""Rows of a Parquet file that are Python objects at one time."""


class UnusableRowError(Exception):
    """A row cannot be used: in words, why."""


class EmptyRowError(UnusableRowError):
    """It has no prompt or no answer."""


@dataclass(frozen=True)
class Row:
    """A row of the user's."""

    where: str
    """File and number, from 1: a line of JSON Lines, a row else."""
    values: Mapping[str, Any]
    fault: str | None = None
    """Why there are no values."""
    folder: Path | None = None
    """Where its relative paths begin; None: it comes from no folder of this machine."""


def read_rows(data: DataSection, wanted: Callable[[str], bool], held_out: bool = False) -> Iterator[Row]:
    """The rows of a source in their order, of the held-out set or of the others.

    Args:
        data: names source, path and split.
        wanted: which columns are needed; others are left out where that spares reading them.

    Raises:
        ConfigurationError: there is no such file, data set or split, or it is none of this format.
    """
    field, path = ("held_out_path", data.held_out_path) if held_out and data.held_out_path else ("path", data.path)
    assert path is not None
    if data.source == "hf":
        split = data.held_out_split if held_out and data.held_out_split else data.split
        yield from _hub(data, path, split, wanted)
        return
    read = _json_lines if data.source == "jsonl" else _parquet
    for file in find_files(field, path, data.source):
        try:
            yield from read(file, wanted)
        except OSError as error:
            raise ConfigurationError(f"data.{field} {file} cannot be read: {error.strerror or error}") from error


def find_files(field: str, path: str, suffix: str) -> list[Path]:
    """The files that a path, a pattern or a directory names, sorted.

    Raises:
        ConfigurationError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    pattern = str(place / f"*.{suffix}") if place.is_dir() else str(place)
    found = sorted(file for name in glob.glob(pattern, recursive=True) if (file := Path(name)).is_file())
    if not found:
        there = "a directory without" if place.is_dir() else "neither a file, nor a directory, nor a pattern of"
        raise ConfigurationError(
            f"data.{field} {path} is {there} .{suffix} files (looked from {Path.cwd()}); correct the path"
        )
    return found


def require_columns(names: Iterable[str], needed: Mapping[str, str], where: str) -> None:
    """Refuses columns that no row has.

    Args:
        names: of the columns that there are.
        needed: column by the field that names it.

    Raises:
        ConfigurationError: names each that is missing, and what was meant.
    """
    there = list(names)
    faults = []
    for field, column in needed.items():
        if column in there or column.partition(".")[0] in there:
            continue
        close = difflib.get_close_matches(column, there, n=1, cutoff=0.6)
        meant = f"did you mean {close[0]}?" if close else f"its columns are {', '.join(map(str, there)) or 'none'}"
        faults.append(f"data.{field} {column!r} is no column of {where}; {meant}")
    if faults:
        raise ConfigurationError("; ".join(faults))


def value_of(values: Mapping[str, Any], column: str) -> Any:
    """What a row has in a column, or, behind a dot, in a nested one.

    Raises:
        KeyError: it has no such column.
    """
    if column in values:
        return values[column]
    first, dot, rest = column.partition(".")
    inner = values[first]
    if not dot or not isinstance(inner, Mapping):
        raise KeyError(column)
    return value_of(inner, rest)


def _json_lines(file: Path, wanted: Callable[[str], bool]) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            where = f"{file}:{number}"
            if number == 1 and text.lstrip().startswith(b"["):
                raise ConfigurationError(
                    f"{file} is one JSON array, not JSON Lines; write one object a line (`jq -c '.[]'` does)"
                )
            try:
                values = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield Row(where, {}, f"it is no JSON in UTF-8 ({' '.join(str(error).split())})")
                continue
            if not isinstance(values, dict):
                yield Row(where, {}, f"it is {type(values).__name__}, not an object of columns")
                continue
            yield Row(where, values, folder=file.parent)


def _parquet(file: Path, wanted: Callable[[str], bool]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            columns = opened.schema_arrow.names
            number = 0
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=[name for name in columns if wanted(name)]):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file} row {number}", values, folder=file.parent)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{file} cannot be read as Parquet ({reason}); give a Parquet file") from error


def columns_of(data: DataSection) -> list[str] | None:
    """The columns of a Parquet source, without reading rows; None: the source does not say."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if data.source != "parquet":
        return None
    assert data.path is not None
    file = find_files("path", data.path, "parquet")[0]
    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"{file} cannot be read as Parquet ({reason}); give a Parquet file") from error


def _hub(data: DataSection, path: str, split: str, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Rows of a data set on the hub, or of a directory that `datasets` reads."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "data.source hf needs datasets, which is not installed: pip install 'near-future[data]', or give the rows "
            "as jsonl or parquet"
        ) from error
    datasets.disable_progress_bars()
    place = Path(path).expanduser()
    with ExitStack() as stack:
        try:
            if (place / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(place))[split]
            elif (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
                loaded = datasets.load_from_disk(str(place))
            elif place.is_dir():
                # What it converts a directory's files into is read once.
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="near-future-"))
                loaded = datasets.load_dataset(str(place), name=data.subset, split=split, cache_dir=scratch)
            else:
                loaded = datasets.load_dataset(path, name=data.subset, split=split, revision=data.revision)
        except Exception as error:  # what its parsers and its client raise
            reason = first_line(error)
            raise ConfigurationError(
                f"data.path {path}: its split {split!r} cannot be loaded ({type(error).__name__}: {reason}); give a "
                "directory or a name on the hub, and data.split and data.subset that it has"
            ) from error
        loaded = loaded.select_columns([name for name in loaded.column_names if wanted(name)])
        features = datasets.Features({name: _undecoded(feature) for name, feature in loaded.features.items()})
        folder = place if place.is_dir() else None
        number = 0
        for batch in loaded.with_format("arrow").iter(ROWS_AT_ONCE):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path} {split} row {number}", features.decode_example(values), folder=folder)


def _undecoded(feature: Any) -> Any:
    """A feature of `datasets`, whose pictures are left the files that they are, however deep they lie."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):
        feature = copy.copy(feature)
        feature.feature = _undecoded(feature.feature)
    return feature
