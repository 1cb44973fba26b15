"""Runs CLIP_benchmark, unchanged, on an exported MM-GEM.

    python tools/run_clip_benchmark.py eval --model_type mmgem --model NAME --pretrained FOLDER \
        --dataset wds/NAME --dataset_root ROOT --task zeroshot_retrieval --output result.json

FOLDER is one of tools/export_torch.py; NAME goes into the result and says nothing else. All other
flags are CLIP_benchmark's own; without --output it takes the folder into the result's file name.
The benchmark drops the transparency of images, which the model itself sets on white.
Needs `pip install clip-benchmark`.
"""

import argparse
import functools
import sys

from transformers import AutoModel

from mmgem_jax.command_line import fail


def load_mmgem(model_name, pretrained, cache_dir=None, device="cpu"):
    """An exported model with the interface of CLIP_benchmark's loaders.

    Args:
      model_name: not used.
      pretrained: folder of tools/export_torch.py.
      cache_dir: of downloaded models; of transformers' by default.
      device: where the model computes.

    Returns:
      The model, with encode_image and encode_text; the transform of a PIL image to a tensor; and
      the tokenizer of a list of texts to token rows.
    """
    model = AutoModel.from_pretrained(pretrained, cache_dir=cache_dir, trust_remote_code=True)
    model, config = model.to(device).eval(), model.config
    # Without the model, which every worker of a DataLoader would get a copy of.
    preprocess = functools.partial(
        sys.modules[type(model).__module__].preprocess,
        size=config.vision_config.image_size,
        mean=config.image_mean,
        std=config.image_std,
    )
    return model, functools.partial(transform, preprocess), model.tokenize


def transform(preprocess, image):
    """A PIL image as the model reads it, fp32 [3, h, w]."""
    return preprocess([image])[0]


def main():
    """CLIP_benchmark's own command line, which knows one more --model_type."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        fail(f"CLIP_benchmark: {error}; expected it: pip install clip-benchmark")
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--task", nargs="?")
    if flags.parse_known_args()[0].task == "captioning":
        fail(
            "--task captioning: CLIP_benchmark reads captions with open_clip's vocabulary; "
            "expected another task, or tools/evaluate.py --task caption"
        )
    models.TYPE2FUNC["mmgem"] = load_mmgem
    models.MODEL_TYPES.append("mmgem")
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
