"""Starts a model from pretrained weights of Hugging Face's CLIP and Llama.

    python tools/import_hf.py --config configs/NAME.py --vision PATH --decoder PATH --out DIR
    python -m mmgem_jax.train --config configs/NAME.py --workdir WORKDIR --config.init_from=DIR

PATH is a folder (config.json and safetensors), a hub name, or for the decoder a GGUF file. A tower
that is not named, and the projections, get the config's random parameters.
"""

from absl import flags

from mmgem_jax import command_line
from mmgem_jax.convert.import_run import import_run

CONFIG = command_line.define_config()
VISION = flags.DEFINE_string("vision", "", "a CLIPVisionModel or CLIPModel: folder or hub name")
DECODER = flags.DEFINE_string("decoder", "", "a LlamaForCausalLM: folder, hub name or GGUF file")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "folder or hub name; the decoder's own by default")
OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
INTERPOLATE = flags.DEFINE_bool(
    "interpolate_positions", False, "fit position embeddings to the config's image size"
)
CUT = flags.DEFINE_bool("cut_layers", False, "take the decoder's first model.decoder.depth layers")


def main():
    """Imports, and prints what that took."""
    report = import_run(
        CONFIG.value,
        OUT.value,
        VISION.value,
        DECODER.value,
        TOKENIZER.value,
        INTERPOLATE.value,
        CUT.value,
    )
    for name, value in report.items():
        print(f"{name:22s}{value}")


if __name__ == "__main__":
    command_line.run(main)
