"""What is compiled: the programs that a run of a config would use, on shapes alone.

train   the train step
eval    the vision tower, the embedding of whole images with their visual tokens, that of texts
decode  the loop that writes captions
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from mmgem_jax import flops, run, sharding, train_state
from mmgem_jax.data.caption_lengths import typical_words
from mmgem_jax.data.sources import sources
from mmgem_jax.evaluation.predictor import Predictor
from mmgem_jax.generate import Decoding
from mmgem_jax.optimizer import make_optimizer
from mmgem_jax.train_step import compile_step, make_train_step

WHAT = ("train", "eval", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, with shapes and shardings of its arguments."""

    name: str
    function: object  # of jax.jit
    held: dict  # by name, what is on a chip before and after a run: params and the like
    arguments: tuple
    images: int  # that a run of it serves
    flops: dict  # model FLOPs of a run, by part
    useful_flops: float | None = None  # of a train step on typical captions, without padding


def complete(config):
    """The config as a run would complete it; where the vocabulary's size is given, it is enough.

    Raises:
      UserError: fields that do not fit together, or no tokenizer.
    """
    vocabulary = config.model.decoder.vocab_size
    tokenizer = stand_in_tokenizer(vocabulary) if vocabulary else run.load_run_tokenizer(config)
    return run.complete(config, tokenizer)


def stand_in_tokenizer(vocabulary):
    """What compilation needs of a tokenizer: how many ids there are, and the special ones.

    Which ids those are changes neither shapes nor time.
    """
    return SimpleNamespace(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        get_vocab=lambda: {"[EMB]": vocabulary - 1},
        convert_tokens_to_ids=lambda _: vocabulary - 1,
    )


def programs(what, config, mesh):
    """The list of Programs of `train`, `eval` or `decode`, of a complete config.

    Raises:
      UserError: the mesh does not fit the config.
    """
    model, shapes = run.build_model(config.model), run.batch_shapes(config)
    optimizer = make_optimizer(config.optimizer)
    if what != "train":
        run.only_evaluate(config)
    run.check_mesh(config, mesh)
    state = train_state.abstract_state(model, optimizer, config.average_decay > 0, shapes, mesh)
    if what == "train":
        step = make_train_step(model, optimizer, config)
        step = compile_step(step, train_state.shardings_of(state), mesh, config.tpu_options)
        # Each source of a mixture has batches of its own shape.
        return [train_program(config, mesh, step, state, source) for source in sources(config.data)]
    tokenizer = stand_in_tokenizer(config.model.decoder.vocab_size)
    decoding = Decoding(length=config.data.caption_length - 1)  # as in a run's own evaluation
    predictor = Predictor(config, model, tokenizer, mesh, decoding)
    made = evaluation_programs if what == "eval" else decode_programs
    return made(config, mesh, predictor, state.params)


def train_program(config, mesh, step, state, source):
    """The train step on batches of a source."""
    shapes = run.batch_shapes(config, source)
    batch = {name: on_mesh(mesh, shape.shape, shape.dtype) for name, shape in shapes.items()}
    held = {"params": state.params, "optimizer": (state.opt_state, state.step, state.faults)}
    held |= {"average": state.average} if state.average is not None else {}
    counted = flops.train_flops(config, shapes)
    words = typical_words(sources(config.data)[source].caption_length)
    useful = sum(flops.train_flops(config, shapes, words).values())
    # Where captions are too long for the rows, some wait, and the places are all in use.
    useful = min(useful, sum(counted.values()))
    name = f"train step, {source}" if source else "train step"
    return Program(name, step, held, (state, batch), config.batch_size, counted, useful)


def evaluation_programs(config, mesh, predictor, params):
    """What an evaluation runs on a batch of images, and of texts, before it compares them."""
    model, B = config.model, config.eval.batch_size
    size, side = model.vision.image_size, model.vision.image_size // model.vision.patch_size
    counted = flops.evaluation_flops(config)
    images = on_mesh(mesh, (B, size, size, 3), jnp.uint8)
    feature_map = on_mesh(mesh, (B, side, side, model.vision.width), model.vision.dtype)
    rows, boxes = on_mesh(mesh, (B,), jnp.int32), on_mesh(mesh, (B, 4), jnp.float32)
    tokens = on_mesh(mesh, (B, config.data.text_length), jnp.int32)
    calls = {
        "feature map": (predictor.feature_map, (images,)),
        "embeddings and visual tokens": (predictor.pooled, (feature_map, rows, boxes)),
        "text embeddings": (predictor.encode_texts, (tokens, rows)),
    }
    return [
        Program(name, function, {"params": params}, (params, *arguments), B, counted[name])
        for name, (function, arguments) in calls.items()
    ]


def decode_programs(config, mesh, predictor, params):
    """The loop over the tokens of captions, at its longest."""
    model, B = config.model, config.eval.batch_size
    shape = (B, model.generation_grid**2, model.decoder.width)
    visual = on_mesh(mesh, shape, model.decoder.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = flops.decode_flops(config, config.data.caption_length - 1)
    arguments = (params, visual, key)
    return [Program("captions", predictor.caption_rows, {"params": params}, arguments, B, counted)]


def on_mesh(mesh, shape, dtype):
    """The shape of an array whose first axis is the batch, as it lies on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
