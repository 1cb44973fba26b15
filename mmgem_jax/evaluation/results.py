"""Results that say how they came about: the stamp of a result, its file, and two side by side."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import PIL

import mmgem_jax
from mmgem_jax import sharding
from mmgem_jax.data.tokenizer import fingerprint
from mmgem_jax.errors import UserError

# Beside its length, what makes each way of decoding.
OPTIONS = {
    "greedy": (),
    "beam": ("beams", "length_penalty", "early_stopping"),
    "sample": ("temperature", "top_k", "top_p"),
}


def parameters_fingerprint(params):
    """sha256 of names, shapes, dtypes and values of parameters; the same on every mesh.

    A leaf at a time is gathered, and no more; of several processes all take part.
    """
    digest = hashlib.sha256()
    # JAX walks a dict in the order of its keys, however it was made.
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{sharding.path_name(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(sharding.to_host(leaf)).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def model_stamp(config, tokenizer, params, step):
    """What was evaluated, and what it saw of images and texts."""
    model = config.model
    return {
        "mmgem_jax": mmgem_jax.__version__,
        "checkpoint": {
            "step": step,
            "averaged": config.average_decay > 0,
            "parameters": parameters_fingerprint(params),
        },
        "tokenizer": fingerprint(tokenizer),
        "preprocessing": {
            "image_size": model.vision.image_size,
            "pillow": PIL.__version__,  # whose resize has changed between versions
            "transparency": "on white",
            "mean": list(model.image_mean),
            "std": list(model.image_std),
        },
        "text_length": config.data.text_length,
        "caption_length": config.data.caption_length,
    }


def data_stamp(dataset, asked, predictor, truncated):
    """On what, and how: protocol, counts, framing, prompts and decoding."""
    stamp = {
        "protocol": protocol_of(dataset, predictor.text_length, truncated),
        "dataset": dataset.name,
        "images": len(dataset.images),
        "texts": len(dataset.texts),
        "classes": len(dataset.class_names),
        "regions": len(dataset.regions or ()),
        "framing": framing_of(dataset),
        "missing_images": list(dataset.missing),
        "annotations": dataset.annotation_hash,
        "tasks": list(asked.tasks),
        "truncated": truncated,
    }
    if {"zero_shot", "region_classification"} & set(asked.tasks):
        stamp["prompts"] = list(asked.templates)
    if "region_classification" in asked.tasks:
        stamp["region_class_names"] = digest_of(dataset.regions.class_names)
    if "pointing" in asked.tasks:
        stamp["window"] = asked.window or predictor.window
    if "zero_shot" in asked.tasks:
        stamp["class_names"] = digest_of(dataset.class_names)
        stamp["likelihood_text"] = asked.likelihood
    if "retrieval" in asked.tasks:
        stamp["rerank"] = asked.rerank
    if {"caption", "region_caption"} & set(asked.tasks):
        stamp["decoding"] = {
            name: getattr(predictor.decoding, name)
            for name in ("method", "length", "cache_dtype", *OPTIONS[predictor.decoding.method])
        }
        if predictor.decoding.method == "sample":  # a batch's images share a key
            draws = {"seed": predictor.seed, "batch_size": predictor.batch_size}
            stamp["decoding"] |= draws
    return stamp


def protocol_of(dataset, text_length, truncated):
    """The protocol's id; where texts of a set of long texts were cut, the id says so."""
    if dataset.long_text and truncated.get("texts"):
        return f"{dataset.protocol}-cut-{text_length}"
    return dataset.protocol


def framing_of(dataset):
    """How `Dataset.pixels` makes an image the model's square."""
    if dataset.regions is None:
        return "short side resized, bicubic, antialiased; centre crop"
    return "whole image resized to the square, bicubic, antialiased"


def digest_of(values):
    """sha256 of a list of texts, in its order."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def check_writable(path, option="--out"):
    """Raises UserError with the option where `path` cannot be written; leaves no file behind."""
    path = Path(path)
    try:
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; expected a file to write") from None


def write_result(path, result):
    """Writes a result as JSON: whole, and then named."""
    path = Path(path)
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(result, indent=2) + "\n")
    written.replace(path)


def read_result(path):
    """The result in a file; UserError where there is none."""
    try:
        result = json.loads(Path(path).read_text())
        numbers = all(isinstance(value, (int, float)) for value in result["metrics"].values())
        if numbers and isinstance(result["protocol"], str):
            return result
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a result's JSON") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: no result; expected JSON with a protocol and metrics")


def comparison(first, second):
    """Two results' files side by side, as lines of text.

    Raises:
      UserError: a file is no result, or the two are of different protocols.
    """
    a, b = read_result(first), read_result(second)
    if a["protocol"] != b["protocol"]:
        raise UserError(
            f"--compare: {first} is of the protocol {a['protocol']} and {second} of "
            f"{b['protocol']}; expected one protocol"
        )
    lines = [f"{a['protocol']}", f"{'':40s}{'A':>10s}{'B':>10s}{'B - A':>10s}"]
    for name in a["metrics"] | b["metrics"]:
        pair = [result["metrics"].get(name) for result in (a, b)]
        cells = ["" if value is None else f"{value:.4f}" for value in pair]
        cells.append("" if None in pair else f"{pair[1] - pair[0]:+.4f}")
        lines.append(f"{name:40s}" + "".join(f"{cell:>10s}" for cell in cells))
    lines += [f"A  {first}", f"B  {second}"]
    other = [name for name in a | b if name != "metrics" and a.get(name) != b.get(name)]
    if other:
        lines.append(f"not the same in both: {', '.join(other)}")
    return "\n".join(lines)


def metrics_table(metrics):
    """Metrics as lines of text."""
    return "\n".join(f"{name:40s}{value:10.4f}" for name, value in metrics.items())
