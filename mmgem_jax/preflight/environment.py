"""What must be in the environment, before jax is imported, to compile for a TPU that is not there.

`os.environ.update(ENVIRONMENT)` is the first thing that `tools/preflight.py` does.
"""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # what this machine has; the TPU is only described
    # libtpu would ask the cloud's metadata server which machine this is: nothing answers here.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Several processes may describe TPUs at once; only one could own one.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Warnings, so that the partitioner's are seen; `compiled.py` catches them.
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}
