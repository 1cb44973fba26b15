"""MM-GEM in PyTorch: one model that embeds images, regions and texts, and captions regions.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.encode_image(images) @ model.encode_text(texts).T
    model.generate_caption(images, boxes, num_beams=5)

Ma et al. 2024, "Multi-Modal Generative Embedding Model" (arXiv 2405.19333). The towers are
transformers' CLIPVisionModel and LlamaForCausalLM; the rest is in this file, which needs torch,
transformers and Pillow, and travels with the weights.

What the methods take:
  images: PIL images, a list or one; or floats [B, 3, h, w] as `preprocess` makes them.
  boxes: for each image a list of boxes, of any length; or numbers [B, R, 4]. A box is x0, y0, x1,
    y1 as shares, 0 to 1, of the square that the model sees: of what `preprocess` cuts out of the
    middle of an image. `crop_boxes` makes them of shares of the whole image. None: all of the
    square, one box each.
  texts: strings, a list or one; or token rows [B, T] as `tokenize` makes them.
All but captions and similarity maps is differentiable: `torch.no_grad()` is the caller's.

Axis letters: B images or texts, R boxes of an image, H W feature-map rows and columns, D width,
E joint embedding, G visual tokens of a box, T tokens, V vocabulary.
"""

import contextlib
import functools
import math
from typing import ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.clip.modeling_clip import CLIPOutput

if not (5, 23) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (6,):
    raise ImportError(f"transformers: found {transformers.__version__}; MM-GEM expects >=5.23,<6")

# What says where files are, beside the name of a folder or of a repository.
SOURCE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class MMGemConfig(transformers.PreTrainedConfig):
    """Sizes of the towers and of what joins them, the scale of pixels, the ids of tokens."""

    model_type = "mmgem"
    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    vision_config: dict | CLIPVisionConfig | None = None
    text_config: dict | LlamaConfig | None = None
    joint_dim: int = 768
    embedding_grid: int = 1  # bins a side of a box that is embedded
    generation_grid: int = 8  # bins a side of a box that is captioned
    image_mean: tuple | list = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    image_std: tuple | list = (0.26862954, 0.26130258, 0.27577711)
    text_length: int = 77  # tokens with <s> and [EMB]
    caption_length: int = 77  # tokens with <s> and </s>
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    emb_token_id: int | None = None
    used_vocab_size: int | None = None  # ids from here on only pad the table

    def __post_init__(self, **kwargs):
        for name, kind in self.sub_configs.items():
            given = getattr(self, name)
            setattr(self, name, given if isinstance(given, kind) else kind(**(given or {})))
        super().__post_init__(**kwargs)


class MMGemModel(transformers.PreTrainedModel):
    """The two towers, the projections h1, h2 and h3 between them, and what they are for."""

    config_class = MMGemConfig
    main_input_name = "images"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_model = transformers.CLIPVisionModel(vision)
        self.language_model = transformers.LlamaForCausalLM(text)
        cells = config.embedding_grid**2
        self.region_projection = nn.Linear(cells * vision.hidden_size, config.joint_dim, bias=False)
        self.visual_token_projection = nn.Linear(vision.hidden_size, text.hidden_size, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.joint_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *arguments, **options):
        """transformers' own, and the tokenizer from where the weights are."""
        name = pretrained_model_name_or_path
        loaded = super().from_pretrained(name, *arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        source = {option: options[option] for option in SOURCE if option in options}
        with contextlib.suppress(ValueError):  # images alone need none
            model.tokenizer = read_tokenizer(name, model.config, **source)
        return loaded

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of `from_pretrained`, or beside the config of a model made otherwise."""
        return read_tokenizer(self.name_or_path, self.config)

    def save_pretrained(self, save_directory, is_main_process=True, **options):
        """transformers' own, and the tokenizer: a whole folder, as `push_to_hub` uploads it.

        The option `push_to_hub=True` would upload it without the tokenizer: use the method.
        """
        tokenizer = self.tokenizer  # ValueError before anything is written
        super().save_pretrained(save_directory, is_main_process, **options)
        if is_main_process:
            tokenizer.save_pretrained(save_directory)

    def forward(self, images, texts):
        """Cosines of all images with all texts, times the learned scale: CLIPModel's output."""
        image_embeds = self.encode_image(images)
        text_embeds = self.encode_text(texts).to(image_embeds.device)
        scale = self.logit_scale.float().exp().clamp(max=100).to(image_embeds.device)
        logits = scale * (image_embeds @ text_embeds.T)
        embeds = {"image_embeds": image_embeds, "text_embeds": text_embeds}
        return CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, **embeds)

    def feature_map(self, images):
        """What the vision tower makes of images, [B, H, W, D]."""
        pixels = images if isinstance(images, torch.Tensor) else self.preprocess(images)
        if pixels.ndim != 4 or not pixels.is_floating_point():
            found = f"{pixels.dtype} {list(pixels.shape)}"
            raise ValueError(f"images: found {found}; expected floats of `preprocess`")
        states = self.vision_model(pixels.to(self.device, self.dtype)).last_hidden_state
        # CLIP applies this norm to the class token alone, which is dropped here.
        cells = self.vision_model.post_layernorm(states[:, 1:])
        side = math.isqrt(cells.shape[1])
        return cells.unflatten(1, (side, side))

    def encode_image(self, images):
        """Unit embeddings of images, fp32 [B, E]."""
        return self.encode_regions(images, None)[:, 0]

    def encode_regions(self, images, boxes):
        """Unit embeddings of boxes, fp32 [B, R, E]; zeros where an image has fewer than R.

        Boxes are shares of the square of `preprocess`; see `crop_boxes`.
        """
        return self.embed_regions(self.feature_map(images), boxes)

    def embed_regions(self, feature_map, boxes):
        """`encode_regions` on a feature map [B, H, W, D], which serves any number of boxes."""
        boxes, real = pad_boxes(boxes, len(feature_map))
        cells = pool(feature_map, boxes, self.config.embedding_grid)
        embeddings = unit(self.region_projection(cells.flatten(2)))
        return embeddings * real[..., None].to(embeddings.device)

    def encode_text(self, texts):
        """Unit embeddings of texts, fp32 [B, E]: h3 of the decoder's state at [EMB]."""
        rows = texts if isinstance(texts, torch.Tensor) else self.tokenize(texts)
        is_emb = rows == self.config.emb_token_id
        if not is_emb.any(dim=1).all():
            raise ValueError("texts: found a row without [EMB]; expected `<s> text [EMB] [PAD]...`")
        # Attention is causal, so the padding after [EMB] is not seen.
        states = self.language_model.model(input_ids=rows.to(self.device), use_cache=False)
        states = states.last_hidden_state
        place = is_emb.int().argmax(dim=1).to(states.device)
        state = states[torch.arange(len(rows), device=states.device), place]
        return unit(self.text_projection(state))

    def visual_tokens(self, images, boxes=None):
        """What the decoder reads of boxes, [B, R, G, D]."""
        feature_map = self.feature_map(images)
        boxes, _ = pad_boxes(boxes, len(feature_map))
        return self.visual_token_projection(pool(feature_map, boxes, self.config.generation_grid))

    def caption_logits(self, images, boxes, tokens):
        """Logits [B, R, T, V] of the token after each of `tokens`, given the box.

        `tokens` is int64 [B, R, T], rows `<s> text`; what is after a token is not seen.
        """
        visual = self.visual_tokens(images, boxes)
        B, R, G, _ = visual.shape
        if tokens.shape[:2] != (B, R):
            raise ValueError(f"tokens: found {list(tokens.shape)}; expected [{B}, {R}, T]")
        x = self._decoder_inputs(visual.flatten(0, 1), tokens.flatten(0, 1))
        states = self.language_model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return self.language_model.lm_head(states[:, G:]).unflatten(0, (B, R))

    def _decoder_inputs(self, visual, tokens):
        """Visual tokens [N, G, D] and the embeddings of tokens [N, T] after them."""
        words = self.language_model.get_input_embeddings()(tokens.to(self.device))
        return torch.cat([visual.to(words), words], dim=1)

    @torch.no_grad()
    def generate_caption(self, images, boxes=None, **options):
        """A caption for each image, list of str; given boxes, a list of such lists, one an image.

        Boxes are shares of the square of `preprocess`; see `crop_boxes`. Greedy, of at most the
        length that captions had in training; `options` are those of transformers' `generate`:
        num_beams=5, max_new_tokens=20, or do_sample=True with temperature, top_k, top_p.
        """
        config, visual = self.config, self.visual_tokens(images, boxes)
        _, real = pad_boxes(boxes, len(visual))
        visual = visual[real.to(visual.device)]  # [N, G, D], of all images
        x = self._decoder_inputs(visual, torch.full((len(visual), 1), config.bos_token_id))
        options = {"do_sample": False, "max_new_tokens": config.caption_length - 1} | options
        suppressed = {*self._never_produced(), *(options.pop("suppress_tokens", None) or ())}
        rows = self.language_model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            suppress_tokens=sorted(suppressed),
            **options,
        )
        if len(rows) != len(visual):
            raise ValueError(f"generate: found {len(rows)} captions of {len(visual)} boxes")
        captions = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        if boxes is None:
            return captions
        left = iter(captions)
        return [[next(left) for _ in range(count)] for count in real.sum(dim=1).tolist()]

    def _never_produced(self):
        """Ids that are no words; where </s> and <s> are one token, it ends a caption."""
        config = self.config
        special = {config.bos_token_id, config.pad_token_id, config.emb_token_id}
        unused = range(config.used_vocab_size, config.text_config.vocab_size)
        return [*sorted(special - {config.eos_token_id}), *unused]

    @torch.no_grad()
    def similarity_map(self, images, texts, window=1):
        """Cosine of a text with each place of an image, fp32 [B, H, W]: the paper's Figure 3.

        A place is a box of `window` cells a side about a cell, cut at the edge of the square of
        `preprocess`, which the map covers. There is a text for each image, or one for all.
        """
        feature_map, texts = self.feature_map(images), self.encode_text(texts)
        B, H, W, _ = feature_map.shape
        if window < 1 or len(texts) not in (1, B):
            found, expected = f"{window}, {len(texts)}", f"at least 1, and 1 or {B}"
            raise ValueError(f"window, number of texts: found {found}; expected {expected}")
        y, x = (place.ravel() + 0.5 for place in np.mgrid[:H, :W])
        half = window / 2
        boxes = np.stack([(x - half) / W, (y - half) / H, (x + half) / W, (y + half) / H], axis=-1)
        regions = self.embed_regions(feature_map, np.tile(boxes.clip(0, 1), (B, 1, 1)))
        return (regions * texts[:, None].to(regions)).sum(dim=-1).unflatten(1, (H, W))

    def preprocess(self, images):
        """PIL images, a list or one, to fp32 [B, 3, h, w]: the square in the middle of each."""
        size, config = self.config.vision_config.image_size, self.config
        return preprocess(images, size, config.image_mean, config.image_std)

    def crop_boxes(self, images, boxes):
        """Boxes of whole PIL images as boxes of the squares that `preprocess` cuts out of them.

        Both are shares, 0 to 1, of width and height. A box is cut at the square's edge; ValueError
        for one that is outside. Returns a list of such boxes for each image.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        whole, real = (each.numpy() for each in pad_boxes(boxes, len(images)))
        size = self.config.vision_config.image_size
        squares = [square_of(image, size) for image in images]
        scaled, corner = (np.tile(xy, 2)[:, None] for xy in zip(*squares, strict=True))  # [B, 1, 4]
        cropped = ((whole * scaled - corner) / size).clip(0, 1)
        outside = whole[real & (cropped[..., :2] >= cropped[..., 2:]).any(axis=-1)]
        if len(outside):
            raise ValueError(f"boxes: found {outside[0]}, outside the square; expected some in it")
        return [own[kept].tolist() for own, kept in zip(cropped, real, strict=True)]

    def tokenize(self, texts):
        """Strings, a list or one, to rows `<s> text [EMB] [PAD]...`, int64 [B, T].

        T is that of the longest; a text too long for the model is cut before [EMB].
        """
        config, texts = self.config, [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts: found none, or others than strings; expected strings")
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        kept = [ids[: config.text_length - 2] for ids in found]
        rows = [torch.tensor([config.bos_token_id, *ids, config.emb_token_id]) for ids in kept]
        return nn.utils.rnn.pad_sequence(rows, True, config.pad_token_id)


def read_tokenizer(name, config, **source):
    """The tokenizer beside weights; a special token written in a text is text to it."""
    # Without the config it would read the folder's, and ask before it runs this file for that.
    options = {"config": config, "split_special_tokens": True}
    try:
        return transformers.AutoTokenizer.from_pretrained(name, **options, **source)
    except (OSError, ValueError) as error:
        expected = "one beside the weights, or set as `model.tokenizer`"
        raise ValueError(f"tokenizer: found none in '{name}'; expected {expected}") from error


def unit(x):
    """x in fp32, scaled to length 1 over the last axis."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-12)


def pad_boxes(boxes, batch):
    """Boxes of `batch` images, fp32 [B, R, 4], and which are no padding, bool [B, R].

    ValueError where they are not such boxes, or are none at all.
    """
    if isinstance(boxes, torch.Tensor):
        boxes = boxes.detach().float().cpu().numpy()
    try:
        each = [[(0, 0, 1, 1)]] * batch if boxes is None else boxes
        each = [np.asarray(own, np.float32).reshape(len(own), 4) for own in each]
        x0, y0, x1, y1 = np.concatenate(each).T
    except (TypeError, ValueError) as error:
        expected = "for each image a list of boxes x0, y0, x1, y1"
        raise ValueError(f"boxes: found {boxes} ({error}); expected {expected}") from None
    counts = np.array([len(own) for own in each])
    if len(each) != batch or not counts.any():
        raise ValueError(f"boxes: found {counts} an image; expected some, for {batch} images")
    bad = ~((x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1))
    if bad.any():
        expected = "shares 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 of width and height"
        raise ValueError(f"boxes: found {np.concatenate(each)[bad][0]}; expected {expected}")
    padded = [np.pad(own, [(0, counts.max() - len(own)), (0, 0)]) for own in each]
    real = np.arange(counts.max()) < counts[:, None]
    return torch.from_numpy(np.stack(padded)), torch.from_numpy(real)


def pool(feature_map, boxes, grid):
    """Averages of a map [B, H, W, D] over grid x grid bins of boxes, [B, R, grid * grid, D].

    RoIAlign (He et al. 2017) with `aligned=True` and adaptive sampling, which is separable: a box
    is two small matrices, [grid, H] and [grid, W].
    """
    H, W = feature_map.shape[1:3]
    x0, y0, x1, y1 = boxes.to(feature_map.device).unbind(-1)
    rows, columns = bin_weights(y0, y1, grid, H), bin_weights(x0, x1, grid, W)
    rows, columns = rows.to(feature_map.dtype), columns.to(feature_map.dtype)
    return torch.einsum("bhwd,brih,brjw->brijd", feature_map, rows, columns).flatten(2, 3)


def bin_weights(start, end, grid, size):
    """Weights, fp32 [..., grid, size], of `size` cells in `grid` bins of the span start..end."""
    start, end = (side[..., None, None, None] * size for side in (start, end))
    length = end - start
    # Rounding must not add a sample: cell 2 of 21 is 1.0000001 long. At least one, for padding.
    samples = (length / grid - 1e-4).ceil().clamp(min=1)
    count = functools.partial(torch.arange, dtype=torch.float32, device=start.device)
    bins, sample, cells = count(grid)[:, None, None], count(-(-size // grid))[:, None], count(size)
    # Cell i's centre is at i + 0.5 (`aligned=True`); beyond the last centre the edge cell holds.
    point = start + (bins + (sample + 0.5) / samples) * (length / grid) - 0.5
    inside = (point >= -1) & (point <= size) & (sample < samples)
    hat = (1 - (point.clamp(0, size - 1) - cells).abs()).clamp(min=0) * inside
    return hat.sum(dim=-2) / samples[..., 0]


def preprocess(images, size, mean, std):
    """PIL images, a list or one, to fp32 [B, 3, size, size]: `MMGemModel.preprocess`."""
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError("images: found none, or others than PIL's; expected PIL images")
    pixels = np.stack([resize_and_crop(to_rgb(image), size) for image in images])
    mean, std = torch.tensor([mean, std], device="cpu")  # where the pixels are
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# CLIPImageProcessor would not do: it drops transparency, which shows colours never meant to be
# seen, and crops an odd margin elsewhere than torchvision does, whose pixels MM-GEM is trained on.
def to_rgb(image):
    """A PIL image in RGB, transparency set on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):  # Pillow would make white of all above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


def square_of(image, size):
    """Width and height with the short side at `size`; left and top of the square in the middle."""
    short = min(image.size)
    scaled = [int(size * side / short) for side in image.size]
    return scaled, [round((side - size) / 2) for side in scaled]


def resize_and_crop(image, size):
    """Short side to `size` (bicubic, antialiased), then the central square; uint8 [h, w, 3]."""
    scaled, (left, top) = square_of(image, size)
    if image.size != (size, size):
        image = image.resize(scaled, Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)
