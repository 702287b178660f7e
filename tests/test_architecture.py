"""The plan of the house: who may import whom, what is public, what importing costs."""

import ast
import functools
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import rwkv7_jax

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
    path
    for package in ("rwkv7_jax", "pallas_kernels")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def name_of(path):
    """The dotted name of a file of ours."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def tree_of(path):
    """The file's syntax."""
    return ast.parse(path.read_text())


@functools.cache
def imports(path):
    """Dotted names that a file imports; relative ones resolved, members named too."""
    return tuple(_imports(path))


def _imports(path):
    parts = name_of(path).split(".")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = parts[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if "pallas_kernels" in p.parts], ids=name_of
)
def test_kernels_import_only_jax(path):
    allowed = {"jax", "jaxlib", "jaxtyping", "pallas_kernels", *sys.stdlib_module_names}
    optional = {"bench.py": {"matplotlib"}, "triton_kernels.py": {"triton"}}
    optional |= {"triton_launcher.py": {"jax_triton", "triton"}}
    if "compile_checks" in path.parts:
        optional["gpu.py"] = {"triton"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed | optional.get(
        path.name, set()
    )


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs_and_packages_do_not_import_each_other(path):
    assert not any(
        name.split(".")[0] in ("rwkv7_jax", "pallas_kernels") for name in imports(path)
    )
    for module in MODULES:
        assert not any(name.split(".")[0] == "configs" for name in imports(module))


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_checkpoints_named_by_configs_are_in_the_repository(path):
    for name in re.findall(r'config\.init = "(.+)"', path.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("folder", ["configs", "tests", "benchmarks"])
def test_only_packages_have_an_init_file(folder):
    assert not (ROOT / folder / "__init__.py").exists()


# Ruff checks the length of functions and that public ones have a docstring; see pyproject.toml.
@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_have_at_most_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


def _packs(node):
    """Tells whether a statement assigns several values at once, other than to exchange names."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    names = sorted(map(ast.unparse, target.elts))
    return names != sorted(map(ast.unparse, node.value.elts))


def test_a_statement_assigns_one_value():
    for path in MODULES:
        packed = [node.lineno for node in ast.walk(tree_of(path)) if _packs(node)]
        assert not packed, name_of(path)


PRODUCTS = {
    f"{module}.{name}"
    for module in ("jnp", "jax.lax", "lax")
    for name in ("dot", "dot_general", "einsum", "inner", "matmul", "tensordot", "vdot")
}


def _products_of_default_precision(path):
    """Finds the lines of matrix products whose precision is left to the platform."""
    chosen = set()
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        # The precision may also be that of `functools.partial(jnp.einsum, ...)`.
        if {"precision", "preferred_element_type"} & {x.arg for x in node.keywords}:
            chosen |= {id(node.func), *map(id, node.args)}
    return [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in PRODUCTS
        and id(node) not in chosen
    ]


def test_matrix_products_name_their_precision():
    # By default, TPUs round float32 operands to bfloat16, and GPUs to TF32.
    for path in MODULES:
        assert not _products_of_default_precision(path), name_of(path)


def test_the_package_has_at_most_25_public_names_and_all_exist():
    names = getattr(rwkv7_jax, "__all__", [])
    assert len(names) <= 25
    assert len(set(names)) == len(names)
    for name in names:
        assert inspect.getdoc(getattr(rwkv7_jax, name)), f"{name} has no docstring."


def test_public_names_load_lazily():
    lines = (
        "import sys, rwkv7_jax",
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules",
        "assert set(rwkv7_jax.__all__) <= set(dir(rwkv7_jax))",
        "from rwkv7_jax import RWKV7, data, sharding",
        "assert rwkv7_jax.RWKV7 is RWKV7 is rwkv7_jax.model.rwkv7.RWKV7",
        "assert not hasattr(rwkv7_jax, 'nothing')",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)


def test_type_checkers_see_the_lazy_names():
    tree = ast.parse((ROOT / "rwkv7_jax" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = {}
    for line in block.body:
        for alias in line.names:
            found[alias.name] = line.module
    rooms = {name for name, module in found.items() if module == "rwkv7_jax"}
    modules = rwkv7_jax._MODULES.items()
    assert found == dict.fromkeys(rooms, "rwkv7_jax") | {
        name: f"rwkv7_jax.{place}" for name, place in modules
    }
    for room in rooms:
        assert (ROOT / "docs" / "api" / f"{room}.md").exists(), room
    assert {*rwkv7_jax._MODULES, "data"} == set(rwkv7_jax.__all__)


IMPORT = """
import jax, time
start = time.process_time()
import rwkv7_jax
for name in rwkv7_jax.__all__:
    getattr(rwkv7_jax, name)
seconds = time.process_time() - start
from jax._src import xla_bridge
assert not xla_bridge._backends, "importing started a backend"
print(seconds)
"""


def test_importing_starts_no_backend_and_costs_little_beyond_jax():
    """The processor's seconds, which other jobs on the machine hardly change: about 2."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6
