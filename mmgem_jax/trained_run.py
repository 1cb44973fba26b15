"""A trained run, from its folder: config, tokenizer, model and the parameters to evaluate."""

import dataclasses
import json
import math
import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mmgem_jax import run, run_folder, sharding, train_state
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.config_checks import check_fields
from mmgem_jax.data.tokenizer import EMB, fingerprint, load_tokenizer, used_vocab_size
from mmgem_jax.errors import UserError
from mmgem_jax.generate import CaptionTokens
from mmgem_jax.models.mmgem import MMGem
from mmgem_jax.models.vision import interpolated_positions

# What a training may have otherwise than the parameters that it starts from.
FREE_AT_START = ["model.generation_grid", "model.vision.image_size"] + [
    f"model.{tower}.{field}"
    for tower in ("vision", "decoder")
    for field in ("dtype", "remat", "unroll")
]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run has come to at one of its steps."""

    config: ConfigDict
    tokenizer: PreTrainedTokenizerFast
    mesh: Any
    model: MMGem
    params: dict  # the average where the run keeps one
    step: int


def load(folder, overrides=()):
    """The newest step of a run, or the one that is asked for.

    Args:
      folder: a workdir of training, or a step of it: WORKDIR/checkpoints/STEP.
      overrides: values by dotted name of the config, such as `mesh.fsdp`.

    Raises:
      UserError: there is no run, no such step, or it does not fit its config, tokenizer or mesh.
    """
    workdir, step = run_folder.find_run(folder)
    config, expected = read_config(workdir / "config.json")
    tokenizer = load_tokenizer(str(workdir / "tokenizer"))
    if fingerprint(tokenizer) != expected:
        raise UserError(
            f"checkpoint {workdir}: the tokenizer in tokenizer/ is {fingerprint(tokenizer)[:12]}; "
            f"expected {expected[:12]}, that of the training"
        )
    saved = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(overrides))
    run.only_evaluate(config)
    mesh = sharding.make_mesh(config.mesh)
    for tower in run.rows_problems(config, sharding.head_shards(mesh)):
        config.model[tower].attention = "plain"  # the same numbers, of images or texts of any size
    run.check_mesh(config, mesh)
    model = run.build_model(config.model)
    # Without an optimizer's state: a part of the checkpoint is read, not all of it.
    shapes = run.batch_shapes(config)
    abstract = train_state.abstract_state(model, optax.identity(), False, shapes, mesh)
    params, step = restore(workdir, step, saved, abstract.params)
    return TrainedRun(config, tokenizer, mesh, model, params, step)


def restore(workdir, step, config, abstract):
    """The parameters to evaluate, laid out as `abstract` says, of a step (None: the newest).

    Where `abstract` is for another image size than the run's `config`, the position embeddings
    are interpolated.

    Returns:
      The parameters, the average where the run keeps one, and their step.
    """
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise UserError(f"checkpoint {workdir}: no such complete step; there are {steps}")
        name = "average" if config.average_decay > 0 else "params"
        wanted = abstract["vision"]["position"]
        side = config.model.vision.image_size // config.model.vision.patch_size
        saved = jax.ShapeDtypeStruct(
            (side**2 + 1, wanted.shape[1]), wanted.dtype, sharding=wanted.sharding
        )
        as_saved = abstract | {"vision": abstract["vision"] | {"position": saved}}
        params = checkpoints.restore_params({name: as_saved}, step)[name]
    if wanted.shape != saved.shape:
        fitted = interpolated_positions(
            sharding.to_host(params["vision"]["position"]), math.isqrt(wanted.shape[0] - 1)
        )
        params["vision"]["position"] = jax.device_put(fitted, wanted.sharding)
    return params, step


def check_start(config, tokenizer):
    """Raises UserError where `config.init_from` is of another tokenizer or of another model."""
    workdir, _ = run_folder.find_run(config.init_from)
    theirs, expected = read_config(workdir / "config.json")
    if fingerprint(tokenizer) != expected:
        raise UserError(
            f"init_from {workdir}: its tokenizer is {expected[:12]}, the run's "
            f"{fingerprint(tokenizer)[:12]}; expected the same (leave data.tokenizer empty)"
        )
    changed = run_folder.differences(theirs.model.to_dict(), config.model.to_dict(), "model.")
    changed = [line for line in changed if line.split()[0] not in FREE_AT_START]
    if changed:
        raise UserError(
            f"init_from {workdir} holds another model: {'; '.join(changed[:5])}; expected the same"
        )


def params_to_start_from(config, tokenizer, abstract):
    """The parameters in `config.init_from`, laid out as `abstract` says; see `check_start`."""
    check_start(config, tokenizer)
    workdir, step = run_folder.find_run(config.init_from)
    theirs, _ = read_config(workdir / "config.json")
    return restore(workdir, step, theirs, abstract)[0]


def mesh_overrides(text):
    """What a tool's --mesh, such as data=2,fsdp=4, overrides in a run's config."""
    changes = {}
    for setting in text.split(",") if text else ():
        axis, _, size = setting.partition("=")
        if axis not in sharding.MESH_AXES or not re.fullmatch("-?[0-9]+", size):
            axes = ", ".join(sharding.MESH_AXES)
            raise UserError(f"--mesh: found {setting!r}, expected AXIS=SIZE of {axes}")
        changes[f"mesh.{axis}"] = int(size)
    return changes


def caption_tokens(tokenizer):
    """The ids that decoding needs, of a run's tokenizer."""
    return CaptionTokens(
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        emb=tokenizer.convert_tokens_to_ids(EMB),
        vocabulary=used_vocab_size(tokenizer),
    )


def read_config(path):
    """The config in a run's config.json, and the fingerprint of its tokenizer."""
    try:
        fields = json.loads(path.read_text())
        tokenizer = fields.pop("tokenizer")
        config = ConfigDict(with_tuples(fields))
        check_fields(config)
    except UserError as error:  # an earlier version had other fields
        raise UserError(f"{path}: {error}; expected the config of a run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: cannot be read; expected the config of a run") from None
    return config, tokenizer


def with_tuples(value):
    """The value with every list a tuple, as configs have them."""
    if isinstance(value, dict):
        return {name: with_tuples(inner) for name, inner in value.items()}
    return tuple(with_tuples(inner) for inner in value) if isinstance(value, list) else value
