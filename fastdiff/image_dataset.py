"""Images in a Hugging Face data set, by a name that evaluation and training both take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.errors import ConfigError, FastDiffError


def image_column(source: str, error: type[FastDiffError]) -> tuple[Any, str]:
    """A `datasets.Dataset` and the name of its column of images.

    Args:
        source: ``datasets:NAME[:SPLIT[:COLUMN]]``, of the hub or of a folder on disk; by default the split ``train``
            and the first column of images.
        error: what to raise where there are no such images.

    Raises:
        ConfigError: if ``source`` does not read so.
        FastDiffError: ``error``, if the library, the split or the column is missing, or there is no image.
    """
    parts = source.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise ConfigError(f"{source!r} does not read as datasets:NAME[:SPLIT[:COLUMN]].")
    try:
        import datasets
    except ImportError as missing:
        raise error(f"{source} needs the datasets library: pip install datasets") from missing
    name, split, column = [*parts, "", ""][:3]
    split = split or "train"
    try:
        found = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name, split=split)
        table = found[split] if isinstance(found, datasets.DatasetDict) else found
    except (OSError, ValueError, KeyError) as reason:
        raise error(f"{source}: there is no split {split!r} of {name!r} to be had: {reason}") from reason
    columns = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    column = column or next(iter(columns), "")
    if column not in columns:
        raise error(f"{source}: no column {column!r} of images; there are: {', '.join(columns) or 'none'}.")
    if not len(table):
        raise error(f"{source} holds no images.")
    return table, column
