"""Annotation files of published data sets: their bytes, hashed, as lines or as JSON."""

import contextlib
import json
from pathlib import Path
from typing import Any

from mmgem_jax.data.broken import Broken
from mmgem_jax.errors import UserError


def read_file(path: Path, digest=None) -> bytes:
    """The bytes of an annotation file, which are added to the hash `digest`; UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected an annotation file") from None
    if digest is not None:
        digest.update(content)
    return content


def decoded(content: bytes, where: object) -> str:
    """Bytes as text; UserError where they are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {error}; expected text in UTF-8") from None


def name_lines(content: bytes, where: object) -> list[str]:
    """The names in a text file, one a line; empty lines are none."""
    lines = (line.strip() for line in decoded(content, where).splitlines())
    return [line for line in lines if line]


def parse_json(content: bytes, path: Path) -> Any:
    """The value of a JSON file's bytes; UserError."""
    try:
        return json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path}: {error}; expected JSON") from None


@contextlib.contextmanager
def reading(where: object, expected: str):
    """Makes one UserError of a value that is not built as its published format says."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, Broken) as error:
        found = f"{type(error).__name__} {error}"
        raise UserError(f"{where}: {found}; expected {expected}") from None
