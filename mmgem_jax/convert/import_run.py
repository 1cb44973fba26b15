"""From Hugging Face's folders to a folder that a training starts from, and what that took."""

import json
import re
from pathlib import Path

import jax
import optax
from huggingface_hub import snapshot_download

from mmgem_jax import run, run_folder, sharding, train_state
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.convert.hf_config import check_fields, decoder_fields, vision_fields
from mmgem_jax.convert.host_memory import PeakMemory
from mmgem_jax.convert.import_weights import check_tensors, decoder_tensors, stream, vision_tensors
from mmgem_jax.convert.table import decoder_places, vision_places
from mmgem_jax.convert.weight_files import open_source
from mmgem_jax.errors import UserError, first_line
from mmgem_jax.new_folder import new_folder

PIXELS = ("image_mean", "image_std")


def import_run(
    config,
    out,
    vision="",
    decoder="",
    tokenizer="",
    interpolate_positions=False,
    cut_layers=False,
):
    """Writes a run of no steps: config.json, tokenizer/, checkpoints/0/, import.json.

    Args:
      config: of the training that is to start from it.
      out: folder to write; new or empty.
      vision: a `CLIPVisionModel` or `CLIPModel`: folder or hub name; "": the tower stays random.
      decoder: a `LlamaForCausalLM`: folder, hub name or GGUF file; "": the decoder stays random.
      tokenizer: folder or hub name; "": the decoder's own, or where there is none the config's.
      interpolate_positions: fit position embeddings to `config.model.vision.image_size`.
      cut_layers: take the first `config.model.decoder.depth` layers of more.

    Returns:
      The content of import.json.

    Raises:
      UserError: whatever does not fit; nothing is left in `out`.
    """
    # ---- what there is, and whether it fits ------------------------------------------------------
    if not (vision or decoder):
        raise UserError("--vision, --decoder: found neither; expected one or both")
    with new_folder(out) as folder:
        given = {"vision": local_copy(vision), "decoder": local_copy(decoder)}
        sources = {tower: open_source(path) for tower, path in given.items() if path}
        config = config.copy_and_resolve_references()
        config.init_from = ""  # the result itself, in configs that name it
        config.data.tokenizer = tokenizer or given["decoder"] or config.data.tokenizer
        tokens = run.load_run_tokenizer(config)
        config = run.complete(config, tokens)
        mesh, model = sharding.make_mesh(config.mesh), run.build_model(config.model)
        run.check_mesh(config, mesh)
        shapes = run.batch_shapes(config)
        abstract = train_state.abstract_state(model, optax.identity(), False, shapes, mesh).params
        towers = {}
        if vision:
            towers["vision"] = planned_vision(config, model, sources, interpolate_positions)
        if decoder:
            towers["decoder"] = planned_decoder(config, model, sources, tokens, cut_layers)
        for tower, (tensors, places) in towers.items():
            check_tensors(sources[tower].path, tensors, places, abstract[tower])

        # ---- into the sharded parameters, and to disk --------------------------------------------
        rest = {name: tree for name, tree in abstract.items() if name not in towers}
        with sharding.use_mesh(mesh):
            initialise = train_state.compile_init(model, rest, shapes)
            memory = PeakMemory()
            params = initialise(jax.random.key(config.seed))
            for tower, (tensors, places) in towers.items():
                params[tower] = stream(tensors, places, abstract[tower])
            with Checkpoints(folder) as checkpoints:
                checkpoints.save_params(0, params)
        config.average_decay = 0.0  # what was never trained has no average
        run_folder.claim_workdir(folder, config, tokens)
        report = report_of(sources, params, memory.taken())
        report |= {"interpolate_positions": interpolate_positions, "cut_layers": cut_layers}
        (folder / "import.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def planned_vision(config, model, sources, interpolate_positions):
    """The vision tower's tensors and their places; its config.json is compared with ours."""
    source = sources["vision"]
    ignored = ("image_size",) if interpolate_positions else ()
    found = vision_fields(source.config)
    check_fields(found, config.model.vision, "vision", source.path, ignored)
    check_pixels(source.path / "preprocessor_config.json", config.model)
    own = model.config.vision
    return vision_tensors(source, own, interpolate_positions), vision_places(own)


def check_pixels(path, config):
    """Raises UserError where the weights were trained on pixels of another scale than ours.

    Args:
      path: of a preprocessor_config.json, which may be absent.
      config: `config.model`.
    """
    if not path.exists():
        return
    try:
        fields = json.loads(path.read_text())
        theirs = {name: tuple(fields.get(name) or config[name]) for name in PIXELS}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path}: found what is not its JSON; expected image_mean, image_std"
        ) from None
    changed = {name: value for name, value in theirs.items() if value != tuple(config[name])}
    if changed:
        ours = ", ".join(f"model.{name} is {tuple(config[name])}" for name in changed)
        overrides = " ".join(f"'--config.model.{name}={value}'" for name, value in changed.items())
        raise UserError(f"{path}: {ours}; the weights were trained with others: give {overrides}")


def planned_decoder(config, model, sources, tokenizer, cut_layers):
    """The decoder's tensors and their places; its config.json is compared with ours."""
    source = sources["decoder"]
    found = decoder_fields(source.config)
    ignored = ("depth",) if cut_layers and found["depth"] > config.model.decoder.depth else ()
    check_fields(found, config.model.decoder, "decoder", source.path, ignored)
    own = model.config.decoder
    return decoder_tensors(source, own, tokenizer, cut_layers), decoder_places(own)


def local_copy(path):
    """The path, or the folder that a hub name is fetched to: never its pickled weights."""
    if not path or Path(path).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        return path
    try:
        return snapshot_download(path, allow_patterns=["*.json", "model*.safetensors", "*.model"])
    except Exception as error:  # the hub's client has no base class for its errors
        raise UserError(
            f"{path}: no such folder, and not to be had from the hub ({first_line(error)})"
        ) from None


def report_of(sources, params, taken):
    """What was imported and the memory it took, for import.json and the screen."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    report = {f"{name}_from": str(source.path) for name, source in sources.items()}
    report["parameters"] = {name: count(tree) for name, tree in params.items()}
    result = sum(x.nbytes for x in jax.tree.leaves(params))
    files = [source.largest_file for source in sources.values()]
    report |= {"result_bytes": result, "largest_file_bytes": max(files)}
    if taken is not None:
        share = round(taken / max(result, *files), 3)
        report |= {"memory_taken_bytes": taken, "memory_taken_share": share}
    return report
