"""Measures how fast a config trains and a decoder writes, beside what the machine can do.

    python tools/benchmark.py train --config configs/emoji.py [--json FILE]
    python tools/benchmark.py growth --config configs/emoji.py [--plot FILE.png]
    python tools/benchmark.py accumulation --config configs/emoji.py
    python tools/benchmark.py checkpoint --config configs/emoji.py
    python tools/benchmark.py data [--config configs/emoji.py]
    python tools/benchmark.py faults [--kills 100]
    python tools/benchmark.py contrastive|caption_loss [--topology v5e:16x16]
    python tools/benchmark.py packing
    python tools/benchmark.py decode

`train` times the step beside the same one in Hugging Face's PyTorch, where that is installed;
`growth`, how its cost grows with its work. `data` sets the pipeline beside open_clip's on pictures
like photos, or says what a config's own data cost; `faults` kills a small run again and again, and
looks for traces of it in the numbers. `checkpoint` says how long a save holds up a step.
`accumulation` sets a batch in 8 parts beside one, `contrastive` and `caption_loss` the losses
beside their plain forms, `packing` packed rows beside padded ones. `decode` needs PyTorch and is of
SmolLM2-135M's architecture. Times vary with the machine and its load: the ratios are taken in one
run, in turns.
"""

import json

from absl import flags
from checkpoint_benchmark import benchmark_checkpoint
from data_benchmark import benchmark_data
from faults_benchmark import benchmark_faults, faults_text
from growth_benchmark import benchmark_growth
from loss_benchmark import benchmark_accumulation, benchmark_caption_loss, benchmark_contrastive
from measure import row
from packing_benchmark import benchmark_packing
from train_benchmark import benchmark_train

from mmgem_jax import command_line
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.results import check_writable


def decode(_):
    """`benchmark_decode`, whose PyTorch the other benchmarks do without."""
    try:
        from decode_benchmark import benchmark_decode
    except ImportError as error:
        raise UserError(f"decode: {error}; pip install -e '.[torch]'") from None
    return benchmark_decode(row)


def growth(config):
    """`benchmark_growth`, with its picture."""
    return benchmark_growth(config, PLOT.value)


# What can be measured of a config: functions from it to rows (`measure.row`).
OF_A_CONFIG = {
    "train": benchmark_train,
    "growth": growth,
    "accumulation": benchmark_accumulation,
    "checkpoint": benchmark_checkpoint,
}
# And by itself, with a topology to predict for or None.
ALONE = {
    "contrastive": benchmark_contrastive,
    "caption_loss": benchmark_caption_loss,
    "packing": lambda _: benchmark_packing(row),
    "decode": decode,
}


def main(what):
    """Runs one benchmark and prints, and with --json writes, what it found."""
    if what in OF_A_CONFIG and CONFIG.value is None:
        raise UserError(f"--config: none; {what} expects one")
    if TOPOLOGY.value and what not in ("contrastive", "caption_loss"):
        raise UserError(f"--topology: given with {what}; expected contrastive or caption_loss")
    if PLOT.value and what != "growth":
        raise UserError(f"--plot: given with {what}; expected it with growth alone")
    for name, holder in (("--json", JSON), ("--plot", PLOT)):
        if holder.value:
            check_writable(holder.value, name)
    if what == "faults":
        found = benchmark_faults(KILLS.value)
        print(faults_text(found))
    else:
        found = rows_of(what)
        print("\n".join(map(row_text, found)))
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump(found, file, indent=2)


def rows_of(what):
    """The rows of a benchmark that has such."""
    if what == "data":
        return benchmark_data(CONFIG.value)
    return OF_A_CONFIG[what](CONFIG.value) if what in OF_A_CONFIG else ALONE[what](TOPOLOGY.value)


def row_text(line):
    """A row in one line."""
    beside = f"   {line['whose']}" if line["whose"] else ""
    if line["ratio"] is not None:
        beside = f"   {line['ratio']:.2f} of {line['whose']} {line['reference']:.4f}"
    return f"{line['name']:40s}{line['ours']:12.4f} {line['unit']}{beside}"


if __name__ == "__main__":
    CONFIG = command_line.define_config(required=False)
    JSON = flags.DEFINE_string("json", None, "also write the rows to this file")
    PLOT = flags.DEFINE_string("plot", None, "picture of what growth measures")
    TOPOLOGY = flags.DEFINE_string("topology", None, "also predict for this one, as v5e:16x16")
    KILLS = flags.DEFINE_integer("kills", 100, "how often faults kills its run", lower_bound=1)
    command_line.run(main, choices=(*OF_A_CONFIG, "data", "faults", *ALONE))
