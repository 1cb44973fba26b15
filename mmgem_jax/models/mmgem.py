"""MM-GEM: one vision transformer and one decoder that embeds texts and captions regions.

    image --vision--> feature map --pool--+-- g_e x g_e --h1--> region embedding v --+
                                          |                                         +-- L_Emb
    text + [EMB] --------------> decoder --- state at [EMB] --h3--> text embedding t +
                                          |
                                          +-- g_g x g_g --h2--> visual tokens --> decoder --> L_Gen

Ma et al. 2024, "Multi-Modal Generative Embedding Model". A whole image is the region
(0, 0, 1, 1), so everything here is about regions.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmgem_jax.models.decoder import Decoder, DecoderConfig
from mmgem_jax.models.layers import linear, named
from mmgem_jax.models.pooling import WHOLE_IMAGE, pool
from mmgem_jax.models.vision import VisionConfig, VisionTransformer, normalize_images

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's clamp of the inverse temperature


@dataclasses.dataclass(frozen=True)
class MMGemConfig:
    """The two towers and what joins them; every field is explained in configs/base.py."""

    vision: VisionConfig
    decoder: DecoderConfig
    joint_dim: int
    embedding_grid: int
    generation_grid: int
    temperature: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


class MMGem(nn.Module):
    """The model, as functions that share parameters; arrays in, arrays out."""

    config: MMGemConfig

    def setup(self):
        config = self.config
        self.vision = VisionTransformer(config.vision)
        self.decoder = Decoder(config.decoder)
        # The paper's light projections h1, h2 and h3.
        axes = ("embed", "projection")
        self.region_projection = linear(config.joint_dim, axes, config.vision.dtype)
        self.visual_token_projection = linear(config.decoder.width, axes, config.decoder.dtype)
        self.text_projection = linear(config.joint_dim, axes, config.decoder.dtype)
        initial = nn.initializers.constant(-math.log(config.temperature))
        self.logit_scale = self.param("logit_scale", named(initial), ())

    def feature_map(self, images):
        """Images, uint8 [B, h, w, 3], to the feature map [B, H, W, D]."""
        config = self.config
        pixels = normalize_images(images, config.image_mean, config.image_std, config.vision.dtype)
        return self.vision(pixels)

    def embed_regions(self, feature_map, boxes):
        """Unit embeddings, fp32 [B, R, E], of boxes [B, R, 4] on a feature map [B, H, W, D]."""
        cells = pool(feature_map, boxes, self.config.embedding_grid)  # [B, R, g * g, D]
        B, R, cells_per_box, D = cells.shape
        return unit(self.region_projection(cells.reshape(B, R, cells_per_box * D)))

    def encode_regions(self, images, boxes):
        """Unit embeddings, fp32 [B, R, E], of boxes [B, R, 4] on uint8 images [B, h, w, 3]."""
        return self.embed_regions(self.feature_map(images), boxes)

    def encode_image(self, images):
        """Unit embeddings, fp32 [B, E], of uint8 images [B, h, w, 3]."""
        return self.encode_regions(images, whole_image(images.shape[0]))[:, 0]

    def encode_text(self, tokens, embed_index):
        """Unit embeddings of texts: h3 of the decoder's state at [EMB].

        Args:
          tokens: int32 [B, T], rows `<s> text [EMB] [PAD]...`.
          embed_index: int32 [B], where [EMB] is in each row.

        Returns:
          fp32 [B, E].
        """
        return self.embed_texts(self.text_states(tokens, embed_index))

    def text_states(self, tokens, embed_index):
        """The decoder's states at [EMB], [B, D], of the arguments of `encode_text`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        segment_ids = (positions <= embed_index[:, None]).astype(jnp.int32)
        states = self.decoder(self.decoder.embed(tokens), positions, segment_ids)
        return jnp.take_along_axis(states, embed_index[:, None, None], axis=1)[:, 0]

    def embed_texts(self, states):
        """Unit embeddings, fp32 [B, E], of the decoder's states at [EMB], [B, D]."""
        return unit(self.text_projection(states))

    def visual_tokens(self, feature_map, boxes):
        """Decoder inputs [B, R, G, D] for boxes [B, R, 4] on a feature map [B, H, W, D]."""
        cells = pool(feature_map, boxes, self.config.generation_grid)
        return self.visual_token_projection(cells)

    def caption_states(self, visual_tokens, tokens, segment_ids):
        """The decoder's states at the tokens of a caption, given its region.

        Args:
          visual_tokens: [B, G, D].
          tokens: int32 [B, T], `<s> text` so far.
          segment_ids: int32 [B, T], 1 for a token, 0 for padding.

        Returns:
          [B, T, D]; state i is about token i + 1.
        """
        B, G, _ = visual_tokens.shape
        T = tokens.shape[1]
        x = jnp.concatenate([visual_tokens, self.decoder.embed(tokens)], axis=1)
        positions = jnp.broadcast_to(jnp.arange(G + T)[None], (B, G + T))
        segment_ids = jnp.concatenate([jnp.ones((B, G), jnp.int32), segment_ids], axis=1)
        return self.decoder(x, positions, segment_ids)[:, G:]

    def caption_logits(self, visual_tokens, tokens, segment_ids):
        """Logits of each next token, fp32 [B, T, V], of the arguments of `caption_states`."""
        return self.decoder.logits(self.caption_states(visual_tokens, tokens, segment_ids))

    def text_row_states(self, tokens, segment_ids, positions):
        """The decoder's states [P, L, D] of packed rows of texts, as for `packed_states`."""
        return self.decoder(self.decoder.embed(tokens), positions, segment_ids)

    def packed_states(self, visual_tokens, visual_index, tokens, segment_ids, positions):
        """The decoder's states of packed rows, which a group of images has to itself.

        Args:
          visual_tokens: [A, M, D], those of all images of each of A groups.
          visual_index: int32 [P, L], which visual token of the group stands here, -1 for none.
          tokens: int32 [P, L], the rows of the groups, one group's after the other's.
          segment_ids: int32 [P, L], of a token's text or caption; 0 for padding.
          positions: int32 [P, L], in its text or caption.

        Returns:
          [A, P / A * L, D].
        """
        A, _, D = visual_tokens.shape
        P, L = tokens.shape
        visual = pick(visual_tokens, visual_index.reshape(A, -1)).reshape(P, L, D)
        x = jnp.where(visual_index[..., None] < 0, self.decoder.embed(tokens), visual)
        return self.decoder(x, positions, segment_ids).reshape(A, -1, D)


def pick(x, index):
    """Of each group's rows x [A, M, D] those that int32 [A, S] names: [A, S, D]; 0 for -1.

    A product with a matrix of 0 and 1, exact: on TPUs a gather, and the more so the scatter that is
    its gradient, would go row by row.
    """
    with jax.named_scope("pick"):
        places = jax.nn.one_hot(index, x.shape[1], dtype=x.dtype)
        precision = jax.lax.Precision.HIGHEST
        return jnp.einsum("ASM,AMD->ASD", places, x, precision=precision)


def whole_image(batch):
    """The box of the whole image, [batch, 1, 4]."""
    return jnp.broadcast_to(jnp.asarray(WHOLE_IMAGE, jnp.float32)[None, None], (batch, 1, 4))


def unit(x):
    """x in fp32, scaled to length 1 over the last axis."""
    x = x.astype(jnp.float32)
    # The small number keeps the gradient of an all-zero vector finite.
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)
