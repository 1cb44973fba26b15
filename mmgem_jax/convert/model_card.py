"""The README.md of an exported folder."""

import jax

import mmgem_jax

HEAD = """---
library_name: transformers
tags: [mm-gem{tags}]
---

# {title}

{what}
Exported by mmgem_jax {version} from step {step} of a run, written as {dtype}; sha256 of the run's
parameters `{fingerprint}`.

| | parameters |
|---|---|
{sizes}

Licence: that of the weights and data the run began from. Name it here, and in a `license:` line at
the top of this file.
"""

MODEL = """
## Use

With torch, transformers at least 5.23 and below 6, and Pillow:

```python
from PIL import Image
from transformers import AutoModel

model = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True).eval()
images = [Image.open("photo.jpg")]

model.encode_image(images) @ model.encode_text(["a dog", "a cat"]).T  # cosines
model.generate_caption(images)                                        # greedy
boxes = model.crop_boxes(images, [[(0.2, 0.0, 0.6, 1.0)]])            # x0, y0, x1, y1
model.encode_regions(images, boxes)
model.generate_caption(images, boxes, num_beams=5)
model.similarity_map(images, ["a dog"])                               # cosines, one a cell
```

The code is `modeling_mmgem.py` in this folder, which is why `trust_remote_code` is needed.
`model.tokenizer` is the tokenizer; `AutoTokenizer.from_pretrained` of this folder asks about the
code as well, unless it is given `trust_remote_code=True`.

- Images: {size} x {size} pixels, the short side resized (bicubic, antialiased), then the square in
  the middle, transparency on white, with
  mean {mean}, std {std}.
  `model.preprocess` is exact; `preprocessor_config.json` is the nearest CLIPImageProcessor, which
  drops transparency.
- Boxes: shares, 0 to 1, of that square, which a similarity map covers as well.
  `model.crop_boxes` makes them of shares of the whole image, cut at the square's edge.
- An image's or a box's embedding: the feature map averaged over {embedding_grid} x {embedding_grid}
  bins of the box. What a caption is written from: {generation_grid} x {generation_grid} bins.
- Token rows: a text's embedding is the decoder's state at [EMB] in `<s> text [EMB]`, {text_length}
  tokens at most; a caption is `<s> text </s>` after the visual tokens, {caption_length} at most.
"""

DECODER = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

Rows begin with `<s>`, which the tokenizer may not put there by itself. In training it read visual
tokens before `<s>`; these, and the image they are from, only the whole model has.
"""

VISION = """
## Use

```python
from transformers import CLIPVisionModel

model = CLIPVisionModel.from_pretrained("THIS_FOLDER")
states = model(pixel_values).last_hidden_state
tower = getattr(model, "vision_model", model)      # older releases nest it
feature_map = tower.post_layernorm(states[:, 1:])  # the whole model's: every patch, normalized
```

Images: {size} x {size} pixels, the short side resized (bicubic, antialiased), then the square in
the middle, transparency on white, with
mean {mean}, std {std}.
The class token was not trained.
"""

VERIFIED = """
## Against the run it comes from

{images} images and {texts} texts ({samples}).
JAX and PyTorch both in fp32 on these parameters; largest difference of any number, at most
{bound:g} allowed:

| output | largest difference |
|---|---|
{differences}

{greedy}Tried with {versions}.
All of it is in `parity.json`.
"""
UNVERIFIED = """
Not compared with the run that it comes from (`--no-verify`).
"""

TITLES = {
    "model": ("MM-GEM", "", MODEL, "A multi-modal generative embedding model (arXiv 2405.19333)."),
    "decoder": ("Decoder of an MM-GEM", ", llama", DECODER, "A plain `LlamaForCausalLM`."),
    "vision": ("Vision tower of an MM-GEM", ", clip", VISION, "A plain `CLIPVisionModel`."),
}


def model_card(trained, what, dtype, fingerprint, parity):
    """The text of README.md.

    Args:
      trained: the TrainedRun that is exported.
      what: model, decoder or vision.
      dtype: of the tensors.
      fingerprint: of all parameters of the run.
      parity: what a verification returned, or None.
    """
    title, tags, use, sentence = TITLES[what]
    config, data = trained.model.config, trained.config.data
    params = trained.params if what == "model" else {what: trained.params[what]}
    head = HEAD.format(
        tags=tags,
        title=title,
        what=sentence,
        version=mmgem_jax.__version__,
        step=trained.step,
        fingerprint=fingerprint,
        dtype=dtype,
        sizes="\n".join(f"| {name} | {count(tree):,} |" for name, tree in params.items()),
    )
    use = use.format(
        size=config.vision.image_size,
        mean=list(config.image_mean),
        std=list(config.image_std),
        embedding_grid=config.embedding_grid,
        generation_grid=config.generation_grid,
        text_length=data.text_length,
        caption_length=data.caption_length,
    )
    return head + use + (verified(parity) if parity else UNVERIFIED)


def count(tree):
    """Numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def verified(parity):
    """What was compared, and what was found."""
    differences = parity["largest_difference"].items()
    texts = len(parity["greedy_texts"])
    return VERIFIED.format(
        images=parity["images"],
        texts=parity["texts"],
        samples=parity["samples"],
        bound=parity["bound"],
        differences="\n".join(f"| {name} | {value:.1e} |" for name, value in differences),
        greedy=f"All {texts} greedily generated texts are equal.\n" if texts else "",
        versions=", ".join(f"{name} {found}" for name, found in parity["versions"].items()),
    )
