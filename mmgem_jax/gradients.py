"""The gradient of the joint loss: of a batch at once, or of its parts one after the other.

In parts it is the same gradient: every embedding meets all negatives of the batch, and L_Gen is the
mean over its tokens. As in GradCache (Gao et al. 2021), a first pass makes the embeddings of all
parts and keeps nothing else, the gradient of L_Emb by the embeddings is taken once, and a second
pass carries it on, part by part, with that of L_Gen.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmgem_jax.objective import loss_terms, outputs, target_count, terms_of, total_loss
from mmgem_jax.optimizer import stop_frozen

EMBEDDINGS, SHARES = ("regions", "texts"), ("gen", "token_accuracy")


def make_gradients(model, config, weights):
    """The function gradients(params, batch) -> (gradients, loss, metrics) of a config.

    Args:
      model: an MMGem.
      config: `accumulation_steps` is the number of parts of a batch.
      weights: `config.loss`, or others like it.
    """
    parts = config.accumulation_steps

    def apply(params, method, *arguments):
        params = stop_frozen(config.optimizer.groups, params)
        return model.apply({"params": params}, *arguments, method=method)

    def whole(params, batch):
        def loss(params):
            terms, metrics = apply(params, loss_terms, batch, weights)
            return total_loss(terms, weights), metrics

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, value, metrics

    def accumulated(params, batch):
        targets = target_count(batch)
        found = jax.lax.map(
            lambda part: chosen(apply(params, outputs, part, weights, targets), EMBEDDINGS),
            split(batch, parts),
        )

        def embedding_loss(params, found):
            scale = stop_frozen(config.optimizer.groups, params)["logit_scale"]
            terms, metrics = terms_of(joined(found, batch), scale, batch, weights)
            return total_loss(terms, weights), metrics

        slopes = jax.value_and_grad(embedding_loss, argnums=(0, 1), has_aux=True)
        (value, metrics), (gradients, slopes) = slopes(params, found)

        def turn(gradients, part_and_slopes):
            part, slopes = part_and_slopes

            def loss(params):
                found = apply(params, outputs, part, weights, targets)
                value = sum((jnp.sum(found[name] * slopes[name]) for name in slopes), jnp.zeros(()))
                if "gen" in found:
                    value += weights.generation_weight * found["gen"]
                return value, chosen(found, SHARES)

            more, shares = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(jnp.add, gradients, more), shares

        gradients, shares = jax.lax.scan(turn, gradients, (split(batch, parts), slopes))
        shares = jax.tree.map(jnp.sum, shares)
        terms, more = terms_of(shares, params["logit_scale"], batch, weights)
        return gradients, value + total_loss(terms, weights), metrics | more

    return whole if parts == 1 else accumulated


def chosen(found, names):
    """Those entries of a dict that it has."""
    return {name: found[name] for name in names if name in found}


def units(batch):
    """Into how many pieces a batch can be cut: its groups, or, where it is not packed, images."""
    return len(batch["targets"] if "targets" in batch else batch["image"])


def split(batch, parts):
    """A batch as parts, arrays [parts, ...], of whole units; each device's units stay on it.

    So part i has the units i, i + parts, ...: of neighbours that lie on one device, one each.
    """

    def cut(x):
        x = x.reshape(units(batch) // parts, parts, -1, *x.shape[1:])  # [.., parts, of a unit, ..]
        x = jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])
        return nn.with_logical_constraint(x, (None, "batch"))

    return {name: cut(x) for name, x in batch.items()}


def joined(found, batch):
    """What parts of a batch gave, arrays [parts, n, ...], in the order of the batch."""

    def join(x):
        parts = len(x)
        x = x.reshape(parts, units(batch) // parts, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])
        return nn.with_logical_constraint(x, ("batch",))

    return jax.tree.map(join, found)
