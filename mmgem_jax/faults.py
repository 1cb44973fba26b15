"""Which updates a step takes: of a finite loss and gradient, and, if asked, of no loss that spikes.

A skipped update leaves everything as it was but the count of steps and what is counted here.
"""

import flax.struct
import jax
import jax.numpy as jnp

from mmgem_jax.errors import UserError

MOST_SOURCES = 16  # of a mixture, whose losses are looked at


class Faults(flax.struct.PyTreeNode):
    """What a run has skipped, and what it takes for a usual loss.

    The losses are those of updates taken. Sources differ in theirs: each has its own place.

    Fields:
      skipped: int32 [], updates skipped since the run began.
      in_a_row: int32 [], those since the last that was taken.
      mean: fp32 [MOST_SOURCES], moving mean of the loss.
      variance: fp32 [MOST_SOURCES], moving variance about it.
      count: int32 [MOST_SOURCES], losses that went into both.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    mean: jax.Array
    variance: jax.Array
    count: jax.Array


def no_faults():
    """The Faults of a run that begins."""
    return Faults(
        skipped=jnp.zeros((), jnp.int32),
        in_a_row=jnp.zeros((), jnp.int32),
        mean=jnp.zeros(MOST_SOURCES),
        variance=jnp.zeros(MOST_SOURCES),
        count=jnp.zeros(MOST_SOURCES, jnp.int32),
    )


def judged(faults, loss, grad_norm, source, config):
    """Whether an update is taken, and the Faults after it.

    What the optimizer makes of the gradient need not be looked at: where the norm is finite, so is
    the square of every entry, and Adam and Muon divide by the size of what they are given.

    Args:
      faults: Faults so far.
      loss: fp32 [], of the global batch.
      grad_norm: fp32 [], of the global gradient.
      source: int32 [n], the batch's source, n times.
      config: `config.faults`.

    Returns:
      bool [], the same on all devices, and Faults.
    """
    taken = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike > 0:
        # All are the same; one row of an array that is split over devices costs more to get.
        source = source.max()
        taken &= ~spikes(faults, loss, source, config)
        faults = chosen(taken, with_loss(faults, loss, source, config.window), faults)
    skipped = jnp.where(taken, 0, 1)
    return taken, faults.replace(
        skipped=faults.skipped + skipped, in_a_row=(faults.in_a_row + skipped) * skipped
    )


def spikes(faults, loss, source, config):
    """Whether a loss is far above its source's mean, of which enough steps are known: bool []."""
    limit = faults.mean[source] + config.spike * jnp.sqrt(faults.variance[source])
    return (faults.count[source] >= config.window) & (loss > limit)


def with_loss(faults, loss, source, window):
    """The Faults with one more loss of a source, in mean and variance.

    The first `window` losses weigh the same, so that there is no bias to correct; after them each
    new one weighs 1 / window, and older ones fade. The update is West's (1979), "Updating mean and
    variance estimates: an improved method".
    """
    mean, variance, count = faults.mean[source], faults.variance[source], faults.count[source] + 1
    weight = 1 / jnp.minimum(count, window)
    away = loss - mean
    return faults.replace(
        mean=faults.mean.at[source].set(mean + weight * away),
        variance=faults.variance.at[source].set((1 - weight) * (variance + weight * away**2)),
        count=faults.count.at[source].set(count),
    )


def chosen(taken, new, old):
    """The new tree if the update is taken, else the old one, bit for bit, whatever the new holds.

    Entry by entry, so that XLA can write it in the old one's place.
    """
    return jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)


def fault_metrics(taken, faults):
    """Metrics of a step, fp32 []: whether its update was skipped; how many, and in a row."""
    found = {
        "update_skipped": ~taken,
        "updates_skipped": faults.skipped,
        "updates_skipped_in_a_row": faults.in_a_row,
    }
    return {name: value.astype(jnp.float32) for name, value in found.items()}


def reason_to_stop(metrics, stop_after):
    """Why a run should end, in one line; None where it should not.

    Args:
      metrics: those of a step, on the host.
      stop_after: `config.faults.stop_after`.
    """
    in_a_row = int(metrics["updates_skipped_in_a_row"])
    if in_a_row < stop_after:
        return None
    return (
        f"faults.stop_after: {in_a_row} updates in a row were skipped; the last had a loss of "
        f"{float(metrics['loss']):g} and a gradient of norm {float(metrics['grad_norm']):g}"
    )


def check_faults(config, sources):
    """Raises UserError where `config.faults` looks at the losses of more sources than it can."""
    if config.spike > 0 and sources > MOST_SOURCES:
        raise UserError(
            f"faults.spike: {config.spike:g} with {sources} sources in data.mixture; expected at "
            f"most {MOST_SOURCES}, or 0"
        )
