"""Compiles what a run would, for TPUs that this machine does not have: does it fit, how fast is it?

    pip install -e '.[preflight]'
    python tools/preflight.py --config configs/vitl_tinyllama_stage1.py --topology v5e:16x16 \
        [--slices N] [--what train|eval|decode] [--json FILE] [--save FILE]
    python tools/preflight.py --config CONFIG --topology TOPOLOGY --fix
    python tools/preflight.py --config CONFIG --topology TOPOLOGY [--plot FILE.png] \
        --sweep auto | 'mesh.fsdp=8,16 batch_size=4096,8192 model.decoder.remat=full,dots'

The vocabulary is that of model.decoder.vocab_size; where that is 0, of the run's tokenizer.
"""

import json
import math
import os

from absl import flags

from mmgem_jax import command_line
from mmgem_jax.errors import UserError
from mmgem_jax.preflight.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before jax is imported, which reads it then

from mmgem_jax.evaluation.results import check_writable
from mmgem_jax.preflight import search
from mmgem_jax.preflight.check import preflight, save_step
from mmgem_jax.preflight.program import WHAT
from mmgem_jax.preflight.text import report_text


def main():
    """Checks, mends or sweeps a config on a topology; prints and writes what there is to know."""
    asked = CONFIG.value, TOPOLOGY.value, SLICES.value, KIND.value
    say = lambda line: print(line, flush=True)  # noqa: E731
    check_flags()
    if FIX.value:
        result = search.fix(*asked, say)
        say(search.verdict(result))
    elif SWEEP.value:
        fields = search.fields_of(SWEEP.value, *asked)
        say(f"{math.prod(map(len, fields.values()))} configs, of some minutes each")
        result = search.sweep(*asked, fields, say)
        say("\n".join(["", "best first", *map(search.row_text, result)]))
        if PLOT.value:
            search.plot(result, PLOT.value)
    else:
        result, executables = preflight(*asked)
        say(report_text(result))
        if SAVE.value:
            save_step(SAVE.value, executables, *asked)
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(result, file, indent=2)


def check_flags():
    """Raises UserError for flags that do not go together or files that cannot be written."""
    if FIX.value and SWEEP.value:
        raise UserError("--fix: given together with --sweep; expected one of them")
    if SAVE.value and (FIX.value or SWEEP.value or KIND.value != "train"):
        raise UserError("--save: given with another job; expected it with --what train alone")
    if PLOT.value and not SWEEP.value:
        raise UserError("--plot: given without --sweep, of which it is the picture")
    for name, holder in (("--json", JSON), ("--save", SAVE), ("--plot", PLOT)):
        if holder.value:
            check_writable(holder.value, name)


if __name__ == "__main__":
    CONFIG = command_line.define_config()
    TOPOLOGY = flags.DEFINE_string("topology", None, "such as v5e:16x16", required=True)
    SLICES = flags.DEFINE_integer("slices", 1, "how many slices of the topology")
    KIND = flags.DEFINE_enum("what", "train", WHAT, "which programs")
    JSON = flags.DEFINE_string("json", None, "also write the report to this file")
    SAVE = flags.DEFINE_string("save", None, "keep the compiled train step in this file")
    FIX = flags.DEFINE_bool("fix", False, "change the config until it fits")
    SWEEP = flags.DEFINE_string("sweep", None, "auto, or fields with their values")
    PLOT = flags.DEFINE_string("plot", None, "picture of a sweep")
    command_line.run(main)
