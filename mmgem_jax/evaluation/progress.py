"""How far a long evaluation is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

from mmgem_jax import processes

SECONDS_A_LINE = 30


def shown(batches, total, what):
    """The batches as they come, `total` of them, while it is shown how many have been."""
    if sys.stderr.isatty() and processes.is_first():
        yield from tqdm(batches, total=total, desc=what, unit="batch")
        return
    began = said = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if done == total or now - said >= SECONDS_A_LINE:
            print(f"{what}: {done}/{total} batches, {now - began:.0f} s", flush=True)
            said = now


def not_shown(batches, total, what):
    """The batches as they come."""
    del total, what
    return batches
