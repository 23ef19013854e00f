"""The documentation agrees with the code: tables, links, commands, Python examples, quoted error messages."""

import ast
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import environment
from test_package import ORDER

import storyllm
from storyllm import GPT, RECIPES, Recipe
from storyllm.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "storyllm"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
}


def parameters(model, **options):
    with torch.device("meta"):  # allocates nothing
        return GPT(model).num_parameters(**options)


def table(page, heading):
    """The rows of the first table whose header starts with `heading`, as {first cell: [other cells]}."""
    lines = PAGES[page][PAGES[page].index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in (rows[0], *rows[2:])}


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def command_lines(page):
    """The lines of the page's code blocks without a language, with continued lines joined and comments removed."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["uvx"]:  # uvx --from ADDRESS command
                words = words[3:]
            if words:
                yield words


def inline_commands(page):
    """Commands in running text and tables, such as `make bench` or `python benchmarks/loss.py`."""
    for code in re.findall(r"`((?:make|storyllm|python benchmarks/)[^`]*)`", without_fences(PAGES[page])):
        yield shlex.split(code)


COMMANDS = [
    (page, words) for page in PAGES for words in [*command_lines(page), *inline_commands(page)] if words != ["storyllm"]
]


def commands(*first):
    found = [words for _, words in COMMANDS if words[: len(first)] == list(first)]
    assert found
    return [pytest.param(words, id=" ".join(words)[:60]) for words in found]


# Tables


def test_the_recipes_table_has_the_numbers_of_the_recipes():
    header, *rows = table("README.md", "recipe").items()
    assert header[1][:6] == ["layers", "heads", "width (`n_embd`)", "context", "parameters", "iterations"]
    assert [name for name, _ in rows] == list(RECIPES)
    for name, cells in rows:
        model = RECIPES[name].model
        numbers = [model.n_layer, model.n_head, model.n_embd, model.block_size]
        numbers += [parameters(model), RECIPES[name].train.max_iters]
        assert cells[:6] == [f"{number:,}" for number in numbers], name


def test_the_training_settings_table_has_the_settings_of_the_recipes():
    header, *rows = table("docs/learning.md", "setting").items()
    cells = dict(rows)
    for column, name in enumerate(name.strip("`") for name in header[1]):
        model, train = RECIPES[name].model, RECIPES[name].train
        tokens = train.max_iters * train.batch_size * model.block_size
        assert cells["optimizer"][column] == {"adamw": "AdamW", "muon": "Muon and AdamW"}[train.optimizer]
        assert cells["windows per update"][column] == f"{train.windows_per_update:,}"
        assert cells["updates"][column] == f"{train.max_iters // train.gradient_accumulation_steps:,}"
        assert cells["tokens"][column] == f"{tokens / 1e6:.1f} million"
        assert cells["schedule"][column].startswith(train.schedule)
        if train.schedule == "wsd":
            assert f"`decay_fraction` {train.decay_fraction}" in cells["schedule"][column]
        rate = cells["learning rate (Muon: 0.2 of it)"][column]
        rates = [float(number) for number in re.findall(r"\b\d(?:e-\d)?\b", rate)]
        assert rates == [train.learning_rate, train.min_lr]
        assert train.optimizer != "muon" or train.muon_lr_scale == 0.2
        assert float(cells["dropout"][column]) == model.dropout
        assert cells["windows"][column] == ("with" if train.windows == "random" else "without") + " replacement"
        assert cells["vocabulary"][column].startswith(f"{model.vocab_size:,},")


def test_the_specification_page_has_the_numbers_of_the_code():
    model, train = RECIPES["faithful"].model, RECIPES["faithful"].train
    text = PAGES["docs/specification.md"]
    for numbers in (
        f"vocabulary of {model.vocab_size:,} tokens, context {model.block_size}, {model.n_layer} layers",
        f"{model.n_head} heads, embedding dimension {model.n_embd}, dropout {model.dropout}",
        f"{parameters(model):,} parameters",
        f"gives {parameters(model, count_tied_head=True):,}",
        f"AdamW ({train.beta1}, {train.beta2}), weight decay {train.weight_decay}, gradient clipping at "
        f"{train.grad_clip}",
        f"batch size {train.batch_size}, gradient accumulation over {train.gradient_accumulation_steps} steps, "
        f"{train.max_iters:,} iterations",
        f"{train.max_iters // train.gradient_accumulation_steps} updates",
        f"warmup over {train.warmup_iters:,} steps",
        f"every {train.resolved_eval_interval} steps",
    ):
        assert numbers in text


def test_the_architecture_page_lists_the_modules_in_order():
    documented = [name for name in table("docs/architecture.md", "module") if name.endswith(".py")]
    assert documented == [f"{module.replace('.', '/')}.py" for module in ORDER if module != "__init__"]


# Links


def anchors(text):
    """GitHub's anchors for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    text = without_fences(PAGES[page])
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    definitions = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    yield from definitions.values()
    used = set(re.findall(r"\]\[([^\]]+)\]", text))
    assert used == set(definitions), "reference links and their definitions differ"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_pictures_resolve(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_every_page_of_the_documentation_can_be_reached_from_the_readme():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page in PAGES and page not in reached:
            reached.add(page)
            todo += [os.path.normpath(Path(page).parent / link.partition("#")[0]) for link in links(page)]
    assert {page for page in PAGES if page.startswith("docs/")} <= reached


def test_the_repository_has_one_address():
    """That of pyproject.toml. Other mentions of it, as in the badges, agree."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    address = urls["Repository"].removeprefix("https://github.com/")
    others = [
        *PAGES.values(),
        (ROOT / "CITATION.cff").read_text(),
        (ROOT / "StoryLLM.ipynb").read_text(),
        *urls.values(),
    ]
    hosts = r"github\.com|colab\.research\.google\.com/github|raw\.githubusercontent\.com"
    found = re.findall(rf"(?:{hosts})/([\w.-]+/[\w-]+)", "\n".join(others))
    assert len(found) > 5
    assert {name for name in found if name.endswith("/storyllm")} == {address}
    assert f"REPOSITORY=https://github.com/{address}\n" in PAGES["README.md"]
    notebook = f"github.com/{address}/blob/main/StoryLLM.ipynb"
    for link in links("README.md"):
        if link.startswith("https://colab.research.google.com/github"):
            assert link == f"https://colab.research.google.com/{notebook.replace('.com', '')}"
        if link.startswith("https://kaggle.com/kernels/"):
            assert link == f"https://kaggle.com/kernels/welcome?src=https://{notebook}"
        if workflow := re.search(r"/actions/(workflows/\w+\.yml)", link):
            assert (ROOT / ".github" / workflow[1]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page):
    names = re.findall(r"`((?:storyllm|benchmarks|tests|docs)/[\w./-]*)`", without_fences(PAGES[page]))
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 10_000


# Commands


@pytest.mark.parametrize("words", commands("make"))
def test_make_targets_exist(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        pattern = rf"^{word.split('=')[0]} [:?]= " if "=" in word else rf"^{word}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


@pytest.mark.parametrize("words", commands("storyllm"))
def test_commands_and_their_options_exist(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([words[1], "--help"])
    help_text = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in words[2:]:
        if option.startswith("--"):
            assert re.search(rf"(^|[\s(|]){re.escape(option)}\b", help_text, re.MULTILINE), option


@pytest.mark.parametrize("words", commands("python"))
def test_benchmarks_and_their_options_exist(words):
    script = ast.parse((ROOT / words[1]).read_text(encoding="utf-8"))
    (function,) = [node for node in script.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    parameters = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    options = {word.removeprefix("--").replace("-", "_") for word in words[2:] if word.startswith("--")}
    assert options <= parameters


@pytest.mark.parametrize("page", PAGES)
def test_recipe_fields_in_examples_exist(page):
    text = PAGES[page].replace("-", "_")
    for part, name in re.findall(r"(?:__|\"|\b)(data|model|train)\.(\w+)(?==|\": | \d)", text):
        fields = {field.name for field in dataclasses.fields(getattr(Recipe(), part))}
        assert name in fields, f"{part}.{name}"


# Python examples


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_python_examples_use_public_names_and_their_parameters(page):
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if _is_public_name(node):
                assert node.attr in storyllm.__all__
            if isinstance(node, ast.Call) and _is_public_name(node.func):
                signature = inspect.signature(getattr(storyllm, node.func.attr))
                signature.bind(*node.args, **{keyword.arg: None for keyword in node.keywords})


def test_the_examples_of_the_architecture_page_run(tiny_data, tiny_run, tmp_path):
    (tmp_path / "data").symlink_to(tiny_data)
    (tmp_path / "checkpoints").symlink_to(tiny_run)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGES["docs/architecture.md"], re.DOTALL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3_000:]


def _is_public_name(node):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "storyllm"


# Error messages


def messages():
    """Every string in the package, with `...` for the values that an f-string fills in."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_in_the_troubleshooting_page_exist():
    known = list(messages())
    quoted = re.findall(r"\*\*`(.+?)`\*\*", PAGES["docs/troubleshooting.md"])
    assert quoted
    for message in quoted:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
        assert any(pattern.search(text) for text in known), message
