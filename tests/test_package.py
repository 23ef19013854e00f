"""The house: who imports whom, what is public, what an import costs."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import storyllm

PACKAGE = Path(storyllm.__file__).parent

# The path of a story through the package: a module leans only on modules before it.
PATH = """
config files log interrupt tokenizer builtin stories tokens pace device sampling linear cache model optim
checkpoint generation evaluation training plots __init__ cli __main__
""".split()


def imported_siblings(module):
    """The modules of this package that `module` imports, at any depth of its code."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module or "__init__"}
        elif isinstance(node, ast.ImportFrom):
            found |= {"absolute import of storyllm"} if (node.module or "").startswith("storyllm") else set()
        elif isinstance(node, ast.Import):
            found |= (
                {"absolute import of storyllm"} if any(a.name.startswith("storyllm") for a in node.names) else set()
            )
    return found


def test_the_path_names_every_module():
    assert sorted(PATH) == sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", PATH)
def test_a_module_imports_only_from_modules_before_it(module):
    assert imported_siblings(module) <= set(PATH[: PATH.index(module)])


def test_no_module_bears_the_name_of_a_public_function():
    assert not set(PATH) & set(storyllm.__all__)


def public_callables():
    for name in storyllm.__all__:
        thing = getattr(storyllm, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            for method_name, method in vars(thing).items():
                if inspect.isfunction(method) and (not method_name.startswith("_") or method_name == "__init__"):
                    yield f"{name}.{method_name}", method


@pytest.mark.parametrize(("name", "function"), list(public_callables()))
def test_public_names_carry_type_hints(name, function):
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert not missing
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", [name for name in storyllm.__all__ if name != "RECIPES"])
def test_public_names_have_a_docstring_of_their_own(name):
    assert len(inspect.getdoc(getattr(storyllm, name)) or "") > 30


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert storyllm.__version__ == version("storyllm")


def test_import_is_silent_and_leaves_the_large_libraries_alone():
    program = """
import sys, torch
before = set(sys.modules)
import storyllm
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"datasets", "matplotlib", "pyarrow", "pandas", "transformers", "tokenizers", "tyro", "IPython"}))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)
