"""The README says what is so: its tables, commands, links and code against the package."""

import ast
import re
from pathlib import Path

import pytest

import storyllm
from storyllm import GPT, RECIPES
from storyllm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(heading):
    """The rows of the table whose first column is headed so, as lists of cells."""
    lines = README[README.index(f"| {heading} |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_recipes_table():
    rows = {row[0].strip("` "): [cell.strip() for cell in row[1:]] for row in table("recipe")}
    assert set(rows) == set(RECIPES)
    for name, recipe in RECIPES.items():
        model = recipe.model
        numbers = [model.n_layer, model.n_head, model.n_embd, model.block_size]
        numbers += [GPT(model).num_parameters(), recipe.train.max_iters]
        assert rows[name][:6] == [f"{number:,}" for number in numbers], name


def test_what_is_said_of_fast_and_small_vocab():
    text = " ".join(README.split())
    for name, tokens in (("fast", "with 2.5M tokens"), ("small-vocab", "61 million tokens")):
        train, model = RECIPES[name].train, RECIPES[name].model
        seen = train.max_iters * train.batch_size * model.block_size / 1e6
        assert float(re.search(r"[\d.]+", tokens)[0]) == pytest.approx(seen, rel=0.01)
        assert tokens in text
        assert f"its {train.max_iters:,} updates" in text
        assert f"an update after every {train.windows_in_update} windows" in text
        assert train.gradient_accumulation_steps == 1 and model.dropout == 0


def test_the_modules_table():
    from test_package import PATH

    assert [row[0].strip("` ") for row in table("module")] == [f"{m}.py" for m in PATH if not m.startswith("__")]
    for row in table("module"):
        assert len(row[1]) > 15


def test_the_specifications_numbers_are_those_of_the_code():
    faithful = RECIPES["faithful"]
    model, train = faithful.model, faithful.train
    text = " ".join(" | ".join(row) for row in table("the specification says"))
    assert f"vocabulary of {model.vocab_size:,}, context {model.block_size}, {model.n_layer} layers" in text
    assert f"{model.n_head} heads, {model.n_embd} channels, dropout {model.dropout}" in text
    assert (
        f"AdamW ({train.beta1}, {train.beta2}), weight decay {train.weight_decay}, clipping at {train.grad_clip}"
        in text
    )
    assert f"batch size {train.batch_size}, accumulation over {train.gradient_accumulation_steps} steps" in text
    assert f"{train.max_iters // train.gradient_accumulation_steps} updates in all" in text
    network = GPT(model)
    assert f"{network.num_parameters():,} parameters" in text
    assert f"gives {network.num_parameters(count_tied_head=True):,}" in text


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_and_pictures_lead_somewhere(target):
    assert target.startswith("https://") or (ROOT / target).exists()


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:storyllm|benchmarks|tests|docs|data)/[\w./-]+)`", README)))
)
def test_named_files_are_there(name):
    made_by_a_run = name.startswith("data/")
    assert made_by_a_run or (ROOT / name).exists()


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"make ([a-z]+)$|`make ([a-z]+)`|^make ([a-z]+) ", README, re.M)))
)
def test_named_make_targets_are_there(name):
    assert re.search(rf"^{''.join(name)}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("line", re.findall(r"^storyllm .*", README, re.M))
def test_the_commands_have_their_options(line, capsys):
    verb, *words = line.split("#")[0].split()[1:]
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    for option in [word for word in words if word.startswith("--") and word != "--help"]:
        assert option in text


def test_the_python_examples_name_what_is_there():
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "storyllm":
                assert node.attr in storyllm.__all__


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z_]+@|TODO|XXX", README)
