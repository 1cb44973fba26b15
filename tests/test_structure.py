"""The house: who may import whom, who knows what, and that everything says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmgem_jax

PACKAGE = Path(mmgem_jax.__file__).parent

# A module imports only from earlier rooms, or its own. New modules get a place here.
ROOMS = (
    ("errors",),
    ("new_folder",),
    ("command_line",),
    ("chips",),
    ("saved_program",),
    ("processes",),
    ("preemption",),
    ("models.shards",),
    ("models.layers",),
    ("models.rotary",),
    ("models.attention",),
    ("models.row_blocks",),
    ("models.splash", "models.row_attention"),
    ("models.pooling",),
    ("models.vision",),
    ("models.decoder",),
    ("models.mmgem",),
    ("contrastive", "caption_loss"),
    ("losses",),
    ("flops",),
    ("sharding",),
    ("param_table",),
    ("objective",),
    ("optimizer",),
    ("gradients",),
    ("faults",),
    ("train_state",),
    ("train_step",),
    ("kv_cache",),
    ("beam_search",),
    ("generate",),
    ("data",),
    ("config_fields",),
    ("config_checks",),
    ("checksums", "damage", "kept_steps"),
    ("run_record",),
    ("checkpoint",),
    ("run_folder",),
    ("tensorboard_file",),
    ("run", "metric_writer", "profiler"),
    ("summary",),
    ("progress", "in_flight"),
    ("trained_run",),
    ("convert",),
    ("evaluation",),
    ("preflight",),
    ("train",),
)

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def room(module):
    """A module's place in ROOMS."""
    for place, names in enumerate(ROOMS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return place
    raise AssertionError(f"mmgem_jax/{module.replace('.', '/')}.py has no room; add it to ROOMS")


def imports(path):
    """Full names of all that a file imports, at its top or within its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path):
    """Modules of the package that a file imports."""
    found = set()
    for name in imports(path):
        if name == "mmgem_jax" or name.startswith("mmgem_jax."):
            inner = name.removeprefix("mmgem_jax").lstrip(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            found.add(inner)
    return found - {""}


def roots(path):
    """Top-level packages that a file imports."""
    return {name.partition(".")[0] for name in imports(path)}


def test_the_package_is_found():
    assert {"models.mmgem", "train", "errors", "data.pipeline"} <= set(MODULES)
    assert "models.layers" in own_imports(MODULES["models.decoder"])
    assert own_imports(MODULES["train_step"]) >= {"sharding", "models.mmgem", "gradients"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    for other in own_imports(MODULES[module]):
        same_room = room(other) == room(module)
        in_folder = module.rpartition(".")[0] == other.rpartition(".")[0] != ""
        assert room(other) < room(module) or (same_room and in_folder), f"{module} <- {other}"


def test_nothing_imports_in_a_circle():
    """Within a folder, where the rooms say nothing."""
    left = {module: own_imports(path) for module, path in MODULES.items()}
    while left:
        free = {module for module, needs in left.items() if not needs & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {module: needs for module, needs in left.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_library_code_imports_neither_torch_nor_tensorflow(module):
    banned = {"torch", "torchvision", "tensorflow", "tensorboard"}
    if module in ("convert.modeling_mmgem", "convert.verify"):  # torch is what they are about
        banned -= {"torch"}
    assert not roots(MODULES[module]) & banned


def test_the_main_module_that_data_workers_import_too_loads_no_torch():
    """Nor do libraries for it."""
    program = "import sys, mmgem_jax.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_the_exported_model_stands_alone():
    standard = {"contextlib", "functools", "math", "typing"}
    allowed = {"torch", "transformers", "numpy", "PIL", *standard}
    assert roots(MODULES["convert.modeling_mmgem"]) <= allowed
    torch_free = {name for name in MODULES if name != "convert.verify"}
    assert not [m for m in torch_free if "convert.modeling_mmgem" in own_imports(MODULES[m])]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("models.")])
def test_the_network_knows_jax_and_flax_alone(module):
    path = MODULES[module]
    assert roots(path) <= {"jax", "flax", "numpy", "mmgem_jax"} | {
        "dataclasses",
        "functools",
        "math",
    }
    assert all(name.startswith("models.") for name in own_imports(path))


@pytest.mark.parametrize(
    ("library", "owner"), [("orbax", "checkpoint"), ("tensorboardX", "tensorboard_file")]
)
def test_a_library_behind_one_file_stays_behind_it(library, owner):
    assert [name for name, path in MODULES.items() if library in roots(path)] == [owner]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "sharding"])
def test_only_sharding_names_mesh_axes(module):
    path = MODULES[module]
    layouts = {"PartitionSpec", "NamedSharding", "Mesh", "P"}
    assert not {name.rpartition(".")[2] for name in imports(path)} & layouts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant):
            assert node.value not in ("fsdp", "tensor"), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in layouts - {"P"}, f"{path.name}:{node.lineno}"
        # "data" is also a plain word; as a key of a mesh's shape it is an axis.
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
            axis = isinstance(node.slice, ast.Constant) and node.slice.value == "data"
            assert not (axis and node.value.attr == "shape"), f"{path.name}:{node.lineno}"


def public_definitions(body, prefix=""):
    """(name, node) of public classes, functions and methods; not of functions in functions."""
    for node in body:
        # `setup` is Linen's __init__.
        if isinstance(node, PUBLIC) and node.name != "setup" and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{node.name}.")


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_has_a_docstring(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), f"{module} has none"
    for name, node in public_definitions(tree.body):
        docstring = ast.get_docstring(node)
        assert docstring, f"{module}.{name} has no docstring"
        assert docstring.splitlines()[0].endswith((".", "?", ":")), f"{module}.{name}: {docstring}"
