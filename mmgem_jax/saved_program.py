"""A compiled train step in a file: made where there is no TPU, it starts a run without compiling.

The file is a pickle, so load only what you made.
"""

import importlib.metadata
import pickle

import jax
from jax.experimental import serialize_executable

from mmgem_jax.errors import UserError, first_line

# The parts of a complete config that the compiled step depends on.
FIELDS = ("batch_size", "accumulation_steps", "average_decay", "tpu_options", "model", "loss")
FIELDS += ("optimizer", "faults")


def fingerprint_of(config, shapes, mesh):
    """What a compiled step was made of, and must be loaded with: a flat dict of strings.

    Args:
      config: a complete config.
      shapes: of a batch (`run.batch_shapes`).
      mesh: the mesh.
    """
    devices = mesh.devices.flatten()
    made = {
        "jax": jax.__version__,
        "device_kind": mesh.devices.flat[0].device_kind,
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "devices": " ".join(map(place_of, devices)),
    }
    if devices[0].platform == "tpu":
        made["libtpu"] = importlib.metadata.version("libtpu")
    made |= {f"batch.{name}": f"{x.dtype}{list(x.shape)}" for name, x in shapes.items()}
    for name in FIELDS:
        made |= flat(config[name], f"config.{name}")
    return made


def place_of(device):
    """Where a device is: its slice and its place in the torus of chips, or its number."""
    if device.platform != "tpu":
        return str(device.id)
    return f"{getattr(device, 'slice_index', 0)}:{','.join(map(str, device.coords))}"


def flat(value, name):
    """The leaves of a config by dotted names, as text."""
    if not hasattr(value, "items"):
        return {name: repr(value)}
    found = {}
    for key in sorted(value):
        found |= flat(value[key], f"{name}.{key}")
    return found


def save_program(path, compiled, fingerprint):
    """Writes a compiled program (`jax.stages.Compiled`) and its fingerprint.

    Raises:
      UserError: the file cannot be written.
    """
    saved = {"fingerprint": fingerprint, "program": serialize_executable.serialize(compiled)}
    try:
        with open(path, "wb") as file:
            pickle.dump(saved, file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a place for a program") from None


def load_program(path, fingerprint, mesh):
    """The program of a file, loaded onto the devices of the mesh, to be called as it was jitted.

    Raises:
      UserError: the file is none of ours, or its program is of something else.
    """
    try:
        with open(path, "rb") as file:
            saved = pickle.load(file)
        theirs, program = saved["fingerprint"], saved["program"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a program of a pre-flight") from None
    except Exception as error:  # what unpickling raises has no common base
        reason = first_line(error)
        raise UserError(f"{path}: {reason}; expected a program of tools/preflight.py") from None
    for name in sorted(fingerprint | theirs):
        if theirs.get(name) != fingerprint.get(name):
            raise UserError(
                f"{path}: {name} is {theirs.get(name)} there and {fingerprint.get(name)} here; "
                "expected a program of this run (tools/preflight.py --save)"
            )
    try:
        return serialize_executable.deserialize_and_load(
            *program, execution_devices=list(mesh.devices.flat)
        )
    except jax.errors.JaxRuntimeError as error:  # such as another version of libtpu
        raise UserError(
            f"{path}: cannot be loaded ({first_line(error)}); expected a program of the same jax "
            "and libtpu"
        ) from None
