"""The joint step in Hugging Face's PyTorch: CLIPVisionModel, LlamaForCausalLM, both losses, AdamW.

What ours is timed against: the same sizes, parameters, padded batch, fp32 and optimizer. All
boxes are whole images, so pooling is an adaptive average. Padding comes last in every row and
attention is causal, so the decoder needs no mask, and sdpa takes its fastest way.
"""

import math
import os
import textwrap

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mmgem_jax.convert.hf_config import clip_config, llama_config
from mmgem_jax.convert.table import model_places, to_weights
from mmgem_jax.errors import UserError
from mmgem_jax.models.mmgem import MAX_LOGIT_SCALE
from mmgem_jax.models.pooling import WHOLE_IMAGE
from mmgem_jax.optimizer import schedule
from mmgem_jax.run import build_model


class JointModel(nn.Module):
    """The two towers and h1, h2, h3, with names that `convert.table.model_places` knows.

    Args:
      config: MMGemConfig.
    """

    def __init__(self, config):
        super().__init__()
        vision, decoder = config.vision, config.decoder
        sdpa = {"attn_implementation": "sdpa"}
        self.vision_model = CLIPVisionModel(CLIPVisionConfig(**clip_config(vision), **sdpa))
        self.language_model = LlamaForCausalLM(LlamaConfig(**llama_config(decoder), **sdpa))
        cells = config.embedding_grid**2
        self.region_projection = nn.Linear(cells * vision.width, config.joint_dim, bias=False)
        self.visual_token_projection = nn.Linear(vision.width, decoder.width, bias=False)
        self.text_projection = nn.Linear(decoder.width, config.joint_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.grids = config.embedding_grid, config.generation_grid
        scale = torch.tensor([config.image_mean, config.image_std])[:, :, None, None]
        self.register_buffer("pixel_scale", scale)

    def forward(self, batch):
        """L_Emb and L_Gen of a batch of `torch_batch`."""
        mean, std = self.pixel_scale
        pixels = (batch["image"].permute(0, 3, 1, 2) / 255 - mean) / std
        states = self.vision_model(pixels).last_hidden_state
        # CLIP applies this norm to the class token alone, which is dropped here.
        cells = self.vision_model.post_layernorm(states[:, 1:])
        side = math.isqrt(cells.shape[1])
        cells = cells.transpose(1, 2).unflatten(2, (side, side))  # [B, D, H, W]
        for_embedding, for_caption = (
            functional.adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2)
            for grid in self.grids
        )
        images = functional.normalize(self.region_projection(for_embedding.flatten(1)), dim=1)
        emb = self.info_nce(images, self.embed_texts(batch), batch["group_ids"])
        return emb, self.caption_loss(self.visual_token_projection(for_caption), batch)

    def embed_texts(self, batch):
        """Unit embeddings [B, E]: h3 of the state at [EMB]."""
        tokens = batch["text_tokens"]
        states = self.language_model.model(input_ids=tokens, use_cache=False).last_hidden_state
        state = states[torch.arange(len(tokens)), batch["embed_index"]]
        return functional.normalize(self.text_projection(state), dim=1)

    def info_nce(self, images, texts, group_ids):
        """Both directions' cross-entropy; pairs that share an id are no negatives."""
        same = (group_ids[:, None, :, None] == group_ids[None, :, None, :]).any(-1).any(-1)
        own = torch.eye(len(same), dtype=torch.bool)
        logits = self.logit_scale.exp() * images @ texts.T
        logits = logits.masked_fill(same & ~own, -1e30)
        target = torch.arange(len(logits))
        return functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)

    def caption_loss(self, visual, batch):
        """Mean cross-entropy of the real tokens after visual tokens [B, G, D]."""
        tokens, targets = batch["caption_tokens"][:, :-1], batch["targets"]
        x = torch.cat([visual, self.language_model.get_input_embeddings()(tokens)], dim=1)
        states = self.language_model(
            inputs_embeds=x, use_cache=False, logits_to_keep=targets.shape[1]
        )
        return functional.cross_entropy(states.logits.flatten(0, 1), targets.flatten())


def torch_batch(batch):
    """Our batch of whole images (numpy) as tensors, a pair a row; -100 for targets that are none.

    Raises:
      UserError: regions, or packed rows.
    """
    if "text_tokens" not in batch:
        raise UserError("data.packing.images: above 0; expected 0, since theirs are padded rows")
    if batch["boxes"].shape[1] != 1 or (batch["boxes"] != WHOLE_IMAGE).any():
        raise UserError(
            f"data.regions_field: found {batch['boxes'].shape[1]} boxes an image; expected whole "
            "images, as Hugging Face's step has no RoIAlign"
        )
    names = ("text_tokens", "embed_index", "caption_tokens", "group_ids")
    rows = {name: torch.from_numpy(batch[name][:, 0].astype(np.int64)) for name in names}
    targets = rows["caption_tokens"][:, 1:].clone()
    length = torch.from_numpy(batch["caption_length"].astype(np.int64))
    targets[torch.arange(1, targets.shape[1] + 1)[None] >= length] = -100
    return rows | {"targets": targets, "image": torch.from_numpy(batch["image"])}


class TheirStep:
    """A step of the joint model in PyTorch, with the state that it changes.

    The first step has been taken; `losses_at_start` are its L_Emb and L_Gen, floats.

    Args:
      config: a complete config whose optimizer has one group, of adamw.
      params: our parameters.
      batch: our batch, numpy.
      compiled: whether torch.compile makes the forward and backward pass.

    Raises:
      UserError: a config or batch that has another step, or a compiler that fails.
    """

    def __init__(self, config, params, batch, compiled):
        check_comparable(config)
        torch.set_num_threads(os.cpu_count())
        model_config = build_model(config.model).config
        self.batch = torch_batch(batch)
        self.weights, self.clip_norm = config.loss, config.optimizer.clip_norm
        self.model = JointModel(model_config)
        load(self.model, params, model_places(model_config))
        self.losses = torch.compile(self.model) if compiled else self.model
        self.optimizer, self.schedule = make_adamw(self.model, config.optimizer)
        try:
            self.losses_at_start = self()
        except RuntimeError as error:
            raise UserError(f"torch: {textwrap.shorten(str(error), 200)}") from None

    def __call__(self):
        """One step; L_Emb and L_Gen before it."""
        emb, gen = self.losses(self.batch)
        loss = self.weights.embedding_weight * emb + self.weights.generation_weight * gen
        loss.backward()
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return emb.item(), gen.item()


def check_comparable(config):
    """Raises UserError for a config whose step is not what this file computes."""
    model, loss = config.model, config.loss
    side = model.vision.image_size // model.vision.patch_size
    expected = {
        "model.vision.dtype": (model.vision.dtype, "float32", model.vision.dtype == "float32"),
        "model.decoder.dtype": (model.decoder.dtype, "float32", model.decoder.dtype == "float32"),
        "loss": ("a term of weight 0", "both", loss.embedding_weight and loss.generation_weight),
        "loss.mask_duplicates": (False, "True", loss.mask_duplicates),
    }
    for name in ("embedding_grid", "generation_grid"):
        # Elsewhere the samples of RoIAlign are no average of whole cells.
        expected[f"model.{name}"] = (model[name], f"a divisor of {side}", side % model[name] == 0)
    for name, (found, wanted, good) in expected.items():
        if not good:
            raise UserError(f"{name}: {found}; expected {wanted}, to compare with Hugging Face's")


def load(model, params, places):
    """Gives a JointModel our parameters, every one of them."""
    weights = {name: torch.from_numpy(tensor) for name, tensor in to_weights(params, places)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not set(missing) <= {"pixel_scale", "language_model.lm_head.weight"}:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")


def make_adamw(model, config):
    """The rule of `mmgem_jax.optimizer` for one group of adamw: optimizer and schedule.

    Args:
      model: JointModel.
      config: `config.optimizer`, with one group.
    """
    (group,) = config.groups.values()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": group.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=group.learning_rate,
        betas=(config.adam_b1, config.adam_b2),
        eps=config.adam_epsilon,
        fused=True,
    )
    shares = np.asarray(schedule(config)(np.arange(config.total_steps + 1)))
    share = lambda step: shares[min(step, config.total_steps)]  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)
