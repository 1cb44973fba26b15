"""One step of training, pure: (state, batch) -> (state, metrics). It serves both stages."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax

from mmgem_jax import sharding
from mmgem_jax.faults import chosen, fault_metrics, judged
from mmgem_jax.gradients import make_gradients
from mmgem_jax.models.mmgem import MAX_LOGIT_SCALE
from mmgem_jax.train_state import TrainState


def make_train_step(model, optimizer, config):
    """The function train_step(state, batch) -> (state, metrics) of a config; not yet compiled.

    An update that is not taken (mmgem_jax/faults.py) leaves params, optimizer and average as they
    were.
    """
    gradients = make_gradients(model, config, config.loss)

    def train_step(state, batch):
        grads, loss, metrics = gradients(state.params, batch)
        grad_norm = optax.tree.norm(grads)
        taken, faults = judged(state.faults, loss, grad_norm, batch["source"], config.faults)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        params = chosen(taken, params, state.params)
        opt_state = chosen(taken, opt_state, state.opt_state)
        average = state.average
        if average is not None:
            # Early on the average is over the updates so far, not over the initial values.
            earlier = state.step - state.faults.skipped
            decay = jnp.minimum(config.average_decay, (earlier + 1) / (earlier + 10))
            # In this form what is frozen stays what it is, to the last bit.
            move = lambda new, old: old + (1 - decay) * (new - old)  # noqa: E731
            average = chosen(taken, jax.tree.map(move, params, average), average)
        metrics |= {"loss": loss, "grad_norm": grad_norm} | fault_metrics(taken, faults)
        metrics |= {f"grad_norm_{name}": optax.tree.norm(tree) for name, tree in grads.items()}
        metrics["param_norm"] = optax.tree.norm(params)
        metrics |= {f"param_norm_{name}": optax.tree.norm(tree) for name, tree in params.items()}
        return TrainState(state.step + 1, params, opt_state, average, faults), metrics

    return train_step


def make_conflict_probe(model, config):
    """The function probe(params, batch) -> metrics: do the objectives fight over the decoder?

    Gradient norms of L_Emb and L_Gen on the shared decoder, and the cosine between the two. It is
    asked of a frozen decoder as well.
    """
    trained = SimpleNamespace(pattern=".*", algorithm="adamw")
    unfrozen = SimpleNamespace(
        accumulation_steps=config.accumulation_steps,
        optimizer=SimpleNamespace(groups={"all": trained}),
    )

    def gradients_of(**weights):
        weights = SimpleNamespace(**(config.loss.to_dict() | weights))
        return make_gradients(model, unfrozen, weights)

    of_emb = gradients_of(embedding_weight=1.0, generation_weight=0.0)
    of_gen = gradients_of(embedding_weight=0.0, generation_weight=1.0)

    def probe(params, batch):
        emb, gen = (gradients(params, batch)[0]["decoder"] for gradients in (of_emb, of_gen))
        norm_emb, norm_gen = optax.tree.norm(emb), optax.tree.norm(gen)
        return {
            "decoder_grad_norm_emb": norm_emb,
            "decoder_grad_norm_gen": norm_gen,
            "decoder_grad_cosine": optax.tree.vdot(emb, gen) / (norm_emb * norm_gen + 1e-12),
        }

    return probe


def compile_step(step, shardings, mesh, tpu_options):
    """`jax.jit` with shardings, which is what `pjit` was; the old state's memory is reused.

    Args:
      step: of `make_train_step`.
      shardings: of the state.
      mesh: the mesh.
      tpu_options: `config.tpu_options`; a mesh of other devices is compiled without.
    """
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(tpu_options, mesh),
    )


def compiler_options(tpu_options, mesh):
    """Those for the devices of the mesh: None where they are no TPUs."""
    return dict(tpu_options) if mesh.devices.flat[0].platform == "tpu" else None
