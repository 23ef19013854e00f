"""The structure of the package: imports, public names, type hints and the cost of `import storyllm`."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import storyllm
from storyllm.openmp import SPIN_COUNT

PACKAGE = Path(storyllm.__file__).parent

# The modules in the order in which a reader follows the data. A module imports only from modules above it.
ORDER = """
openmp config recipes files device
data.space_stories data.synthetic data.formats data.local_files data.hold_out data.stories data.tokenizer
data.tokenizer_json data.token_file data.prepare data.shards data.windows
model.linear model.loss model.sampling model.kv_cache model.decoding model.initialization model.gpt model.quantization
checkpoint importing storyteller
evaluation.likelihood evaluation.statistics evaluation.vocabulary evaluation.reference evaluation.diversity
evaluation.novelty evaluation.consistency evaluation.protocol evaluation.comparison evaluation.pages evaluation.report
evaluation.ratings
training.interrupt training.distributed training.muon training.optimizer training.trackers training.log training.mirror
training.execution training.progress training.initial_model training.run_folder training.samples training.loop
training.launch
plots.style plots.loss_curves plots.architecture plots.text plots.predictions plots.internals
export.model_card export.hugging_face export.gguf_file export.web_page
__init__ cli __main__
""".split()
FOLDERS = list(dict.fromkeys(name.split(".")[0] for name in ORDER if "." in name))

# Imported only where they are used, because each takes up to a second or is optional.
LAZY = {"datasets", "matplotlib", "pyarrow", "pandas", "transformers", "tokenizers", "tyro", "IPython"}
LAZY |= {"huggingface_hub", "safetensors", "gguf", "tensorboard", "wandb", "trackio", "sacrebleu"}


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def imported_modules(module: str) -> set[str]:
    """The modules of the package that `module` imports anywhere in its code, as they are named in ORDER."""
    package = ["storyllm", *module.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, path = name.partition(".")
            if root == "storyllm":  # the longest prefix that is a module; the rest are names within it
                parts = path.split(".")
                prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
                found.add(next((prefix for prefix in prefixes if prefix in ORDER), "__init__"))
    return found


def public_definitions(module: str) -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """The public functions, classes and methods of a module, with their qualified names."""
    found: list[tuple[str, ast.FunctionDef | ast.ClassDef]] = []
    for node in parse(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                found += [(f"{node.name}.{m.name}", m) for m in methods if not m.name.startswith("_")]
                found += [(f"{node.name}.{m.name}", m) for m in methods if m.name in ("__init__", "__call__")]
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("variables", "spin_count"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)],
)
def test_threads_spin_briefly_unless_the_user_chose_otherwise(variables, spin_count):
    kept = {n: v for n, v in environment().items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import builtins, os, sys; load = builtins.__import__\n"
        "def watch(name, *rest):\n"
        "    if name == 'torch' and 'torch' not in sys.modules: print(os.environ.get('GOMP_SPINCOUNT'))\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = watch\n"
        "import storyllm"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**kept, **variables}, capture_output=True, text=True)
    assert done.stdout == f"{spin_count}\n"  # when torch was imported


def test_every_module_is_in_the_order():
    files = PACKAGE.rglob("*.py")
    modules = {".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files}
    assert modules == {*ORDER, *(f"{folder}.__init__" for folder in FOLDERS)}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_modules_above_it(module):
    assert imported_modules(module) <= set(ORDER[: ORDER.index(module)])


def test_imports_are_recognized():
    """Without this the test above could pass because it sees nothing."""
    assert imported_modules("checkpoint") >= {"config", "data.tokenizer", "model.gpt"}
    assert imported_modules("model.loss") == {"model.linear"}
    assert {"__init__", "training.loop"} <= imported_modules("cli")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_a_docstring_and_exports_nothing(folder):
    tree = parse(f"{folder}.__init__")
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("module", ORDER)
def test_modules_and_public_names_have_docstrings(module):
    assert ast.get_docstring(parse(module))
    for name, node in public_definitions(module):
        if "." not in name and module != "cli":  # the docstrings in cli.py are help texts
            assert ast.get_docstring(node), name


@pytest.mark.parametrize("module", ORDER)
def test_public_functions_have_type_hints(module):
    for name, node in public_definitions(module):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            missing = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
            assert not missing and node.returns is not None, name


def test_public_names_exist_and_are_listed():
    assert all(hasattr(storyllm, name) for name in storyllm.__all__)
    assert len(storyllm.__all__) == len(set(storyllm.__all__))
    imported = {
        alias.asname or alias.name
        for node in parse("__init__").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if not name.startswith("_")} == set(storyllm.__all__)


def test_no_module_or_folder_has_the_name_of_a_public_function():
    functions = {name for name in storyllm.__all__ if inspect.isroutine(getattr(storyllm, name))}
    assert "train" in functions
    assert not functions & {*FOLDERS, *(name for name in ORDER if "." not in name)}


def test_the_version_is_defined_once():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "storyllm.__version__"}
    assert storyllm.__version__ == importlib.metadata.version("storyllm")


def test_the_versions_on_colab_are_kept():
    """Installing the package there must not replace what is preinstalled."""
    lines = (PACKAGE.parent / "tests/colab-constraints.txt").read_text(encoding="utf-8").splitlines()
    colab = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    requirements = {r.name: r.specifier for r in map(Requirement, required) if r.name in colab}
    assert {"torch", "datasets", "pyarrow", "tokenizers", "tqdm"} <= set(requirements)
    assert [name for name, specifier in requirements.items() if colab[name] not in specifier] == []
    assert Version("3.13") in SpecifierSet(project["requires-python"])


def test_import_is_silent_and_imports_no_large_library():
    program = f"""
import sys, torch
before = set(sys.modules)
import storyllm
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & {LAZY!r}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment()
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)
