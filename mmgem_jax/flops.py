"""Model FLOPs: what the matrix products of a config cost on paper.

A product of [m, k] and [k, n] is 2 m k n FLOPs; nothing else is counted. With the axis letters of
models/layers.py, and F for the mlp, P for the pixels of a patch's side, an image costs forward

  vision      2 M^2 3P^2 D for the patches, M = H = W; then for each layer, S = M^2 + 1 positions:
              8 S D^2 for query, key, value and out, 4 S D F for the mlp, 4 S^2 D for the scores
              and what they weigh
  pooling     per region and grid g: 2 g H W D to pool one axis, 2 g^2 W D to pool the other; for
              g = 1, 2 H W for the weights of all cells and 2 H W D to pool
  projections per region: 2 g_e^2 D E (h1), 2 g_g^2 D D' (h2), 2 D' E (h3); D' is the decoder's D
  decoder     per row of T positions and layer: 4 T D N C for query and out, 4 T D K C for key and
              value, 6 T D F for gate, up and down, 4 T^2 N C for attention. A region has two rows:
              its text of T positions, and G visual tokens with T' of its caption. Where they are
              packed, each is a segment of a row, as long as it is: padding is not counted, nor what
              the segments of a row do not see of each other
  head        2 T' D V per caption, next-token logits
  similarity  2 N^2 E for the N regions of the whole batch

Of attention the whole matrix of scores counts, as in PaLM's MFU (Chowdhery et al. 2022, appendix
B), the half that a causal mask hides included; padding counts as tokens do where rows are padded.

The backward pass of a product is a product of the same size for each of its two operands that
needs a gradient: in general a step is three times the forward pass. Pixels and boxes need none, nor
do the parameters of a frozen group, nor what only frozen parameters lead to. What rematerialisation
computes a second time never counts, so a step that does it has a lower MFU.
"""

import re
from dataclasses import dataclass

import jax

PARTS = (
    "vision",
    "pooling",
    "projections",
    "text decoder",
    "caption decoder",
    "packed decoder",
    "head",
    "similarity",
)


@dataclass(frozen=True)
class Product:
    """A matrix product: its FLOPs, and how many of its operands need a gradient (0 to 2)."""

    part: str
    flops: int
    gradients: int = 0


def train_flops(config, batch, words=None):
    """FLOPs of one step over the global batch, forward and backward, by part.

    Args:
      config: a complete config.
      batch: a batch (top of mmgem_jax/objective.py) or its shapes (`run.batch_shapes`). Of the
        shapes of packed rows every place counts, as of segments that are all of the mean length.
      words: int [n], tokens of typical texts, which are their own captions. If given, no padding
        counts: the regions' texts are taken to be like these.

    Returns:
      dict from a name of PARTS to FLOPs; parts of a loss of weight 0 are absent.
    """
    return total(step_products(config, batch, words), backward=True)


def evaluation_flops(config):
    """Forward FLOPs of the programs of an evaluation, on `eval.batch_size` whole images or texts.

    Returns:
      dict from `feature map`, `embeddings and visual tokens` and `text embeddings` to FLOPs by
      part.
    """
    model, B, untrained = config.model, config.eval.batch_size, lambda *_: False
    regions = projection_products(model, B, untrained, False)
    for grid in (model.embedding_grid, model.generation_grid):
        regions += pooling_products(model, B, 1, grid, False)
    texts = [
        Product("text decoder", decoder_flops(model.decoder, B, config.data.text_length)),
        Product("projections", 2 * B * model.decoder.width * model.joint_dim),
    ]
    products = {
        "feature map": vision_products(model, B, untrained),
        "embeddings and visual tokens": regions,
        "text embeddings": texts,
    }
    return {name: total(own, backward=False) for name, own in products.items()}


def decode_flops(config, length):
    """FLOPs of greedy captions of `length` tokens for `eval.batch_size` regions.

    Every turn of the loop attends to all slots of the cache, filled or not.
    """
    B, decoder = config.eval.batch_size, config.model.decoder
    prompt = config.model.generation_grid**2 + 1
    slots = prompt + length - 1
    once = decoder_flops(decoder, B, prompt, slots)
    turn = decoder_flops(decoder, B, 1, slots)
    head = 2 * B * decoder.width * decoder.vocab_size
    return {"caption decoder": once + (length - 1) * turn, "head": length * head}


def total(products, backward):
    """Sums over the products of each part."""
    found = {}
    for product in products:
        times = 1 + (product.gradients if backward else 0)
        found[product.part] = found.get(product.part, 0) + times * product.flops
    return {part: found[part] for part in PARTS if part in found}


class Gradients:
    """Which parameters of a config are trained."""

    def __init__(self, config):
        groups = config.optimizer.groups.values()
        self.trained = [g.pattern for g in groups if g.algorithm != "frozen"]

    def __call__(self, *paths):
        """Whether any of these parameters is trained."""
        return any(re.fullmatch(pattern, path) for pattern in self.trained for path in paths)


def step_products(config, batch, words=None):
    """Every product of the forward pass of a training step; see `train_flops`."""
    model, decoder, loss = config.model, config.model.decoder, config.loss
    (B, R), V, D, E = batch["region_mask"].shape, decoder.vocab_size, decoder.width, model.joint_dim
    N, trained = B * R, Gradients(config)
    map_flows = trained(*VISION_INPUTS, *vision_kernels(), "vision/post_norm/scale")
    embedding = trained("decoder/embedding")
    token_flows = map_flows or embedding or trained("visual_token_projection/kernel")
    blocks = [f"decoder/blocks/{name}/kernel" for name in DECODER_KERNELS]
    if words is not None:
        rows, targets = typical_rows(config, N, words)
    else:
        rows, targets = (packed_rows if "tokens" in batch else padded_rows)(config, batch)
    decoded = [
        product
        for part, tokens, squares in rows
        for product in decoder_products(
            *(decoder, part, tokens, squares, trained),
            embedding if part == "text decoder" else token_flows,
        )
    ]

    found = vision_products(model, B, trained)
    if loss.embedding_weight:
        found += pooling_products(model, B, R, model.embedding_grid, map_flows)
        found += projection_products(model, N, trained, map_flows, tokens=False)
        text_flows = embedding or trained(*blocks, "decoder/final_norm/scale")
        kernel = "text_projection/kernel"
        found.append(Product("projections", 2 * N * D * E, text_flows + trained(kernel)))
        region_flows = map_flows or trained("region_projection/kernel")
        sides = region_flows + (text_flows or trained(kernel))
        found.append(Product("similarity", 2 * N * N * E, sides))
    if loss.generation_weight:
        found += pooling_products(model, B, R, model.generation_grid, map_flows)
        found += projection_products(model, N, trained, map_flows, regions=False)
        flows = token_flows or trained(*blocks)
        head = "decoder/embedding" if decoder.tie_embeddings else "decoder/head"
        found.append(Product("head", 2 * targets * D * V, flows + trained(head)))
    return found + decoded


def padded_rows(config, batch):
    """What the decoder does in its passes, and the number of next tokens.

    Returns:
      [(part, tokens, sum of the squares of the rows' lengths)], and the number.
    """
    B, R, T = batch["text_tokens"].shape
    targets = batch["caption_tokens"].shape[2] - 1
    P = config.model.generation_grid**2 + targets
    found = []
    if config.loss.embedding_weight:
        found.append(("text decoder", B * R * T, B * R * T * T))
    if config.loss.generation_weight:
        found.append(("caption decoder", B * R * P, B * R * P * P))
    return found, B * R * targets


def packed_rows(config, batch):
    """The same of packed rows, for which segments stand in the place of rows."""
    if isinstance(batch["tokens"], jax.ShapeDtypeStruct):
        tokens, targets = batch["tokens"].size, batch["targets"].size
        regions = batch["embed_place"].size
        caption = config.model.generation_grid**2 + targets / regions
        text = max(tokens / regions - caption, 0)
        return [("packed decoder", tokens, regions * (caption**2 + text**2))], targets
    real = batch["segment_ids"] > 0
    # n^2 is the sum of the first n odd numbers; in fp32, for of a large batch it is above 2^31.
    squares = ((2 * batch["positions"] + 1) * real).sum(dtype="float32")
    return [("packed decoder", int(real.sum()), int(squares))], int(batch["target_mask"].sum())


def typical_rows(config, regions, words):
    """The same of so many regions, whose texts and captions are of `words` tokens, unpadded."""
    texts, captions = words + 2, config.model.generation_grid**2 + words + 1
    found = []
    if config.loss.embedding_weight:
        found.append(("text decoder", texts))
    if config.loss.generation_weight:
        found.append(("caption decoder", captions))
    found = [(part, regions * x.mean(), regions * (x**2).mean()) for part, x in found]
    return found, regions * (words + 1).mean()


VISION_INPUTS = ("vision/patch/kernel", "vision/class_token", "vision/position")
VISION_INPUTS += ("vision/pre_norm/scale",)
VISION_KERNELS = ("query", "key", "value", "out", "up", "down")
DECODER_KERNELS = ("query", "key", "value", "out", "gate", "up", "down")


def vision_kernels():
    """Paths of the matrices of the vision tower's layers."""
    return [f"vision/blocks/{name}/kernel" for name in VISION_KERNELS]


def vision_products(model, B, trained):
    """The vision tower on B images."""
    config = model.vision
    D, M, patch = config.width, config.image_size // config.patch_size, 3 * config.patch_size**2
    S = M * M + 1
    flows = trained(*VISION_INPUTS, *vision_kernels())
    found = [Product("vision", 2 * B * M * M * patch * D, int(trained("vision/patch/kernel")))]
    for path, name in zip(vision_kernels(), VISION_KERNELS, strict=True):
        out = config.mlp if name in ("up", "down") else D
        flops = config.depth * 2 * B * S * D * out
        found.append(Product("vision", flops, flows + trained(path)))
    return [*found, Product("vision", config.depth * 4 * B * S * S * D, 2 * flows)]


def pooling_products(model, B, R, grid, map_flows):
    """R boxes on each of B feature maps; the box's own matrices need no gradient."""
    D, M = model.vision.width, model.vision.image_size // model.vision.patch_size
    if grid == 1:  # the two vectors of a box first: one row of the map's size
        return [
            Product("pooling", 2 * B * R * M * M),
            Product("pooling", 2 * B * R * M * M * D, int(map_flows)),
        ]
    flops = 2 * B * R * (grid * M * M * D + grid * grid * M * D)
    return [Product("pooling", flops, int(map_flows))]


def projection_products(model, N, trained, map_flows, regions=True, tokens=True):
    """h1 and h2 of N regions."""
    D, found = model.vision.width, []
    if regions:
        flops = 2 * N * model.embedding_grid**2 * D * model.joint_dim
        gradients = map_flows + trained("region_projection/kernel")
        found.append(Product("projections", flops, gradients))
    if tokens:
        flops = 2 * N * model.generation_grid**2 * D * model.decoder.width
        gradients = map_flows + trained("visual_token_projection/kernel")
        found.append(Product("projections", flops, gradients))
    return found


def decoder_flops(config, rows, T, S=None):
    """The decoder's layers on rows of T positions that see S key positions (T by default)."""
    sizes = sum(decoder_kernel_sizes(config).values())
    attention = 2 * T * (S or T) * config.heads * config.head_dim
    return config.depth * rows * 2 * (T * sizes + attention)


def decoder_kernel_sizes(config):
    """Numbers of entries of the matrices of a layer."""
    D, F = config.width, config.mlp
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {"query": heads, "key": kv_heads, "value": kv_heads, "out": heads}
    sizes |= {"gate": F, "up": F, "down": F}
    return {name: D * other for name, other in sizes.items()}


def decoder_products(config, part, tokens, squares, trained, flows):
    """The decoder's layers in training.

    Args:
      config: `config.model.decoder`.
      part: of PARTS.
      tokens: all that pass.
      squares: sum of the squares of the numbers of those that see each other.
      trained: a Gradients.
      flows: whether its input needs a gradient.
    """
    sizes = decoder_kernel_sizes(config)
    flows = flows or trained(*(f"decoder/blocks/{name}/kernel" for name in sizes))
    found = [
        Product(
            part,
            config.depth * 2 * tokens * size,
            flows + trained(f"decoder/blocks/{name}/kernel"),
        )
        for name, size in sizes.items()
    ]
    attention = config.depth * 4 * squares * config.heads * config.head_dim
    return [*found, Product(part, attention, 2 * flows)]
