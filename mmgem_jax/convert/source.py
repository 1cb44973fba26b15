"""What weights from outside look like here, whatever file they lie in."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # fp32, read anew at every call; UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """What a folder of Hugging Face's, or a GGUF file, holds."""

    path: Path
    config: dict  # the content of config.json, or the same fields of a GGUF file
    tensors: dict[str, Tensor]  # by Hugging Face's names
    largest_file: int  # bytes
