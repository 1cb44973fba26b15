"""What a run is made of before it takes a step: a checked config, mesh, tokenizer and model."""

import dataclasses
import json
import operator
from pathlib import Path

import jax
import numpy as np

from mmgem_jax import sharding
from mmgem_jax.data.pipeline import find_builder, regions_an_image, sources
from mmgem_jax.data.tokenizer import fingerprint, load_tokenizer, padded_vocab_size
from mmgem_jax.errors import UserError
from mmgem_jax.models.decoder import DecoderConfig
from mmgem_jax.models.layers import ACTIVATIONS, REMAT_POLICIES, ROPE_TYPES, RopeScaling
from mmgem_jax.models.mmgem import MMGem, MMGemConfig
from mmgem_jax.models.vision import VisionConfig

# What may change between the parts of a run; the rest of the config makes the run. The tokenizer
# is compared by its fingerprint; what the run began from is not looked at again.
FREE = {"eval", "log", "checkpoint", "mesh", "compile_cache", "init_from"}
FREE |= {"data.dir", "data.prefetch", "data.tokenizer"}

# Fields that configs did not have from the start, and what they were before.
LATER_FIELDS = {
    "model.decoder": {"rope_scaling": dataclasses.asdict(RopeScaling())},
    "loss": {"mask_overlap": 0.5},
    "data": {
        "regions_field": "",
        "whole_image": True,
        "max_regions": 16,
        "min_visible": 0.5,
        "mixture": {},
        "weight": 1.0,
    },
}

CHOICES = {
    "model.vision.activation": tuple(ACTIVATIONS),
    "model.vision.dtype": ("float32", "bfloat16"),
    "model.vision.remat": ("none", *REMAT_POLICIES),
    "model.decoder.dtype": ("float32", "bfloat16"),
    "model.decoder.remat": ("none", *REMAT_POLICIES),
    "model.decoder.rope_scaling.type": ROPE_TYPES,
}


def build_model(config):
    """The model of `config.model`.

    Raises:
      UserError: sizes that do not fit together.
    """
    fields = config.to_dict()
    try:
        fields["vision"] = VisionConfig(**fields["vision"])
        fields["decoder"]["rope_scaling"] = RopeScaling(**fields["decoder"]["rope_scaling"])
        fields["decoder"] = DecoderConfig(**fields["decoder"])
        return MMGem(MMGemConfig(**fields))
    except ValueError as error:
        raise UserError(f"model.{error}") from None


def load_run_tokenizer(config, workdir=None):
    """The tokenizer that `config.data` names, or that of `init_from`, or of the data set.

    Args:
      config: the whole config.
      workdir: of the run. Where it has begun, its own copy stands for that of `init_from`.
    """
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    if not config.init_from:
        folder = find_builder(config.data).data_path
    elif workdir and (Path(workdir) / "tokenizer").is_dir():
        folder = Path(workdir)
    else:
        folder, _ = find_run(config.init_from)
    return load_tokenizer(str(folder / "tokenizer"))


def find_run(folder):
    """The workdir of a run, and the step that `folder` names or None.

    Raises:
      UserError: there is no run.
    """
    folder, step = Path(folder), None
    workdir, inner = folder.absolute(), folder.absolute().parent
    if folder.name.isdecimal() and inner.name == "checkpoints":
        workdir, step = inner.parent, int(folder.name)
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        return workdir, step
    raise UserError(
        f"checkpoint {folder}: no config.json and checkpoints/ there; expected a workdir of "
        "training, or a step of it (WORKDIR/checkpoints/STEP)"
    )


def complete(config, tokenizer):
    """The config with what the tokenizer and the run's length decide filled in.

    Raises:
      UserError: fields that do not fit together.
    """
    config = config.copy_and_resolve_references()
    needed = padded_vocab_size(tokenizer)
    decoder = config.model.decoder
    if decoder.vocab_size and decoder.vocab_size < needed:
        raise UserError(
            f"model.decoder.vocab_size: {decoder.vocab_size} is below the {needed} that the "
            "tokenizer needs"
        )
    decoder.vocab_size = decoder.vocab_size or needed
    with config.optimizer.unlocked():
        config.optimizer.total_steps = config.steps
    least = {"steps": 1, "batch_size": 1, "eval.batch_size": 1, "data.workers": 0}
    least |= {"data.text_length": 3, "data.caption_length": 3}  # begin, a token, end
    least |= {"model.embedding_grid": 1, "model.generation_grid": 1, "model.temperature": 1e-6}
    for name, value in least.items():
        found = operator.attrgetter(name)(config)
        if found < value:
            raise UserError(f"{name}: {found}; expected at least {value}")
    for name, known in CHOICES.items():
        found = operator.attrgetter(name)(config)
        if found not in known:
            raise UserError(f"{name}: {found!r}; expected one of {', '.join(known)}")
    if not (config.eval.caption_field or config.data.regions_field):
        raise UserError("eval.caption_field: empty; expected a text field of the data set")
    if not (config.loss.embedding_weight or config.loss.generation_weight):
        raise UserError("loss: both weights are 0; expected one above")
    return config


def check_mesh(config, mesh):
    """Raises UserError where the mesh does not divide the batch or the heads."""
    if jax.process_count() > 1:
        raise UserError(
            f"mesh: {jax.process_count()} processes; this version trains with one, on all of its "
            "devices"
        )
    shards, model = sharding.head_shards(mesh), config.model
    heads = {
        "vision.heads": model.vision.heads,
        "decoder.heads": model.decoder.heads,
        "decoder.kv_heads": model.decoder.kv_heads,
    }
    for name, count in heads.items():
        if count % shards:
            raise UserError(
                f"mesh: model.{name} is {count}; expected a multiple of the {shards} parts that "
                f"the mesh {dict(mesh.shape)} splits heads into"
            )
    shards = np.lcm(sharding.batch_shards(mesh), jax.process_count())
    if config.batch_size % shards:
        raise UserError(
            f"batch_size: {config.batch_size} is not a multiple of the {shards} parts that the "
            f"mesh {dict(mesh.shape)} splits a batch into"
        )


def batch_shapes(config):
    """Shapes of a global batch (top of mmgem_jax/objective.py) of the data's first source."""
    B, size = config.batch_size, config.model.vision.image_size
    data = next(iter(sources(config.data).values()))
    R = regions_an_image(data)
    shapes = {
        "image": ((B, size, size, 3), np.uint8),
        "boxes": ((B, R, 4), np.float32),
        "region_mask": ((B, R), np.bool_),
        "text_tokens": ((B, R, data.text_length), np.int32),
        "embed_index": ((B, R), np.int32),
        "caption_tokens": ((B, R, data.caption_length), np.int32),
        "caption_length": ((B, R), np.int32),
        "group_ids": ((B, R, 2), np.int32),
        "truncated": ((B, R, 2), np.bool_),
        "region_counts": ((B, 4), np.int32),
        "source": ((B,), np.int32),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def has_begun(workdir):
    """Whether there is a run in the folder, with or without a checkpoint."""
    return (Path(workdir) / "config.json").exists()


def claim_workdir(workdir, config, tokenizer):
    """Makes the run's folder, or checks that it holds a run of this config; saves both there.

    Raises:
      UserError: the folder cannot be written, or holds another config's run.
    """
    path = Path(workdir) / "config.json"
    ours = json.loads(json.dumps(config.to_dict())) | {"tokenizer": fingerprint(tokenizer)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = differences(with_later_fields(path.read_text()), ours) if path.exists() else []
        if changed:
            raise UserError(
                f"workdir {workdir} holds another config's run: {'; '.join(changed[:5])}; "
                "expected the same config or an empty folder"
            )
        # Written whole and then named: a run that is killed here can still be resumed.
        written = path.with_suffix(".json.new")
        written.write_text(json.dumps(ours, indent=2) + "\n")
        written.replace(path)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"workdir {workdir}: config.json is no run's; expected one") from None
    except OSError as error:
        raise UserError(f"workdir {workdir}: {error.strerror}; expected a folder") from None
    tokenizer.save_pretrained(path.parent / "tokenizer")


def with_later_fields(text):
    """What a run's config.json says, and what it meant before the fields that came later.

    Raises:
      ValueError: the text is not JSON.
    """
    fields = json.loads(text)
    for name, later in LATER_FIELDS.items():
        section = fields
        for part in name.split("."):
            section = section.get(part, {})
        section |= later | section
    return fields


def differences(theirs, ours, prefix=""):
    """Fields that differ, outside FREE, as `field: theirs there, ours here`."""
    found = []
    for key in sorted(set(theirs) | set(ours)):
        if prefix + key in FREE:
            continue
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return found


def describe_source(name, data):
    """One line on a source of a config's data."""
    rows = "whole images" if data.whole_image else ""
    if data.regions_field:
        rows += f"{' and ' if rows else ''}up to {data.max_regions} regions an image"
    drawn = f"{name}, weight {data.weight:g}: " if name else ""
    lengths = f"text {data.text_length}, caption {data.caption_length} tokens"
    return f"{drawn}{data.name}, split {data.split}, {rows}, {lengths}"


def summary(config, mesh, abstract, start):
    """One screen on what is about to run."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    bytes_a_device = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )
    towers = ", ".join(f"{name} {count(tree):,}" for name, tree in abstract.params.items())
    model, device = config.model, mesh.devices.flat[0]
    side = model.vision.image_size // model.vision.patch_size
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    grids = f"embedding {model.embedding_grid}x{model.embedding_grid}"
    grids += f", generation {model.generation_grid}x{model.generation_grid}"
    steps = f"{config.steps:,}" + (f", resumed at {start:,}" if start else "")
    of_sources = [describe_source(*source) for source in sources(config.data).items()]
    lines = {
        "devices": f"{mesh.size} x {device.device_kind}, mesh {axes}, "
        f"{jax.process_count()} process(es)",
        "parameters": f"{count(abstract.params):,}: {towers}",
        "state": f"{bytes_a_device / 2**20:,.1f} MiB a device",
        "grids": f"{grids} over a {side}x{side} map",
        "data": f"\n{'':12s}".join(of_sources),
        "batch": f"{config.batch_size:,} images, made by {config.data.workers} worker(s)",
        "loss": f"{config.loss.embedding_weight:g} L_Emb + {config.loss.generation_weight:g} L_Gen",
        "steps": steps,
    }
    return "\n".join(f"{name:12s}{value}" for name, value in lines.items())
