"""Weights from outside, opened lazily: folders of Hugging Face's in safetensors, and GGUF files.

Pickle (.bin, .pt, .ckpt) is never loaded, because it can run code.
"""

import functools
import json
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy knows the name bfloat16 once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open

from mmgem_jax.convert.gguf_file import open_gguf
from mmgem_jax.convert.source import Source, Tensor
from mmgem_jax.errors import UserError, first_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
NO_PICKLE = (
    "expected safetensors (pickle is never loaded because it can run code; save the model with "
    "transformers' save_pretrained)"
)
DTYPES = ("F32", "F16", "BF16")  # fp32 holds each of their values


def open_source(path) -> Source:
    """What a folder (config.json and safetensors, single or sharded) or a *.gguf file holds.

    Only headers are read here. `Tensor.read` opens the file, copies one tensor and closes it: a
    file that stays mapped would count as resident memory, page after page.

    Raises:
      UserError: the path is no such folder or file, or what it holds is damaged, incomplete,
        set twice, or pickle.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    if path.suffix in OTHER_FORMATS and path.is_file():
        raise UserError(f"{path}: {NO_PICKLE}")
    if path.is_file():
        raise UserError(
            f"{path}: found a single file; expected its folder, with config.json, or a *.gguf file"
        )
    if not path.is_dir():
        raise UserError(f"{path}: does not exist; expected a folder or a *.gguf file")
    config = _json_object(path / "config.json")
    index = path / INDEX
    if index.exists() and not (path / SINGLE).exists():
        files, tensors = _sharded(index)
    else:
        files = [_single(path)]
        tensors = _tensors(files[0])
    return Source(path, config, tensors, max(file.stat().st_size for file in files))


def _json_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist; expected the config.json of a Hugging Face model"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: found a {type(content).__name__}; expected a JSON object")
    return content


def _single(folder: Path) -> Path:
    """The one safetensors file of a folder without an index."""
    if (folder / SINGLE).exists():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder}: found {len(found)} *.safetensors files; expected {INDEX}, which says what "
            "each one holds"
        )
    other = sorted(file.name for file in folder.iterdir() if file.suffix in OTHER_FORMATS)
    if other:
        raise UserError(f"{folder}: found {other[0]}; {NO_PICKLE}")
    raise UserError(
        f"{folder}: found no weights; expected {SINGLE}, or {INDEX} and its shards, never pickle"
    )


def _sharded(index: Path) -> tuple[list[Path], dict[str, Tensor]]:
    """The shards that an index names, and their tensors, which the index must agree with."""
    shard_of = _json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index}: weight_map: expected an object of tensor name: shard")
    tensors, held_by = {}, {}
    for shard in sorted({_shard_name(index, shard) for shard in shard_of.values()}):
        file = index.parent / shard
        if not file.exists():
            raise UserError(f"{index}: names {shard}, which is not there")
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name} is set twice, here and in {held_by[name]}")
            tensors[name], held_by[name] = tensor, shard
    for name in sorted(shard_of.keys() | held_by.keys()):
        if shard_of.get(name) != held_by.get(name):
            raise UserError(
                f"{index}: tensor {name}: found in {held_by.get(name, 'no shard')}; the index "
                f"says {shard_of.get(name, 'nothing of it')}"
            )
    return [index.parent / shard for shard in sorted(set(held_by.values()))], tensors


def _shard_name(index: Path, shard) -> str:
    if not isinstance(shard, str) or "\\" in shard or Path(shard).name != shard:
        raise UserError(f"{index}: found shard {shard!r}; expected the name of a file beside it")
    if not shard.endswith(".safetensors"):
        raise UserError(f"{index}: found shard {shard!r}; expected a *.safetensors file")
    return shard


def _tensors(file: Path) -> dict[str, Tensor]:
    with _opened(file) as opened:
        return {
            name: Tensor(
                tuple(opened.get_slice(name).get_shape()), functools.partial(_read, file, name)
            )
            for name in opened.keys()  # noqa: SIM118  no mapping
        }


def _read(file: Path, name: str) -> np.ndarray:
    with _opened(file) as opened:
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{file}: tensor {name}: found {dtype}; expected one of {', '.join(DTYPES)}"
            )
        return opened.get_tensor(name).astype(np.float32, copy=False)


def _opened(file: Path):
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: expected a safetensors file ({first_line(error)})") from error
