"""The command line, as a person types it: five verbs, and bad input in one line with exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import storyllm
from storyllm.cli import main

SMALL = "--model.block-size 16 --model.n-layer 1 --model.n-head 2 --model.n-embd 16 --train.eval-windows 4".split()
SHORT = "--train.batch-size 2 --train.gradient-accumulation-steps 1 --train.device cpu --train.max-iters 6".split()


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """A folder with a trained model, made on the command line."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoints"
    arguments = ["train", "--recipe", "demo", "--data-dir", str(tiny_data), "--checkpoint-dir", str(folder)]
    assert main([*arguments, *SMALL, *SHORT]) == 0
    return folder


def test_the_whole_path(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = "prepare --recipe demo --builtin-stories 300 --tokenizer bpe:400"
    assert main(prepare.split()) == 0
    assert "data/train.bin: 300 stories" in capsys.readouterr().out
    assert main(prepare.split()) == 0  # nothing to do
    assert main(["train", "--recipe", "demo", *SMALL, *SHORT]) == 0
    out = capsys.readouterr().out
    assert re.search(r"best validation loss \d\.\d{4} \(\d\.\d{4} bits per byte\)", out)
    assert main(["tell", "--max-new-tokens", "5", "--seed", "1", "Once upon a time"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert main(["tell", "--num-stories", "3", "--max-new-tokens", "5", "A pig"]) == 0
    assert capsys.readouterr().out.count("A pig") == 3
    assert main(["evaluate"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "bits per byte" in out
    assert main(["plot"]) == 0
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "checkpoints" / "log.jsonl").read_bytes())
    assert main("plot --log checkpoints/log.jsonl copy.jsonl --out both.png".split()) == 0
    for name in ("losses.png", "both.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best_model_params.pt",
        "last.1.pt",
        "last.pt",
        "log.jsonl",
    ]


def test_options_reach_the_recipe(run):
    recipe = storyllm.read_log(run / "log.jsonl").run["recipe"]
    assert recipe["model"] | {"n_layer": 1, "n_embd": 16, "block_size": 16, "n_head": 2} == recipe["model"]
    assert recipe["train"]["max_iters"] == 6
    assert recipe["train"]["learning_rate"] == storyllm.RECIPES["demo"].train.learning_rate


@pytest.mark.parametrize("verb", [None, "prepare", "train", "tell", "evaluate", "plot"])
def test_help_is_there_and_ends_well(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*([verb] if verb else []), "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "dataclass" not in out
    assert "StoryLLMError" not in out


def test_every_field_of_the_recipe_is_an_option(capsys):
    import dataclasses

    for verb, prefix, config in [
        ("train", "--model.", storyllm.GPTConfig),
        ("train", "--train.", storyllm.TrainConfig),
        ("prepare", "--", storyllm.DataConfig),
    ]:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        out = capsys.readouterr().out
        for field in dataclasses.fields(config):
            if field.name != "vocab_size":  # the data's
                assert prefix + field.name.replace("_", "-") in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"storyllm {storyllm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --recipe fathful", "there is no recipe 'fathful', expected one of: faithful, fast, small-vocab, demo"),
        ("train --model.n-embd 100", "n_embd is 100, expected a multiple of n_head (6)"),
        ("train --train.learning-rate -1", "learning_rate is -1.0, expected more than 0"),
        ("train --data-dir nowhere", "there is no nowhere/train.bin: make the data with `storyllm prepare`"),
        ("prepare --tokenizer bpe:many", "tokenizer is 'bpe:many', expected 'gpt2' or 'bpe:N'"),
        ("prepare --source nothing.txt", "there is no file or folder 'nothing.txt'"),
        ("tell --checkpoint nothing.pt", "there is no checkpoint nothing.pt"),
        ("tell --top-p 1.5 --checkpoint {run}/last.pt", "top_p is 1.5, expected"),
        ("tell --num-stories 0 --checkpoint {run}/last.pt", "num_stories is 0, expected at least 1"),
        ("tell --device tpu --checkpoint {run}/last.pt", "device 'tpu' is not on this machine"),
        ("evaluate --checkpoint {run}/last.pt --data nothing.bin", "there is no nothing.bin"),
        ("plot --log nothing.jsonl", "there is no log nothing.jsonl"),
        ("plot --log {run}/log.jsonl --out /proc/none/losses.png", "/proc/none"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.format(run=run).split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_verify_says_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("prepare --recipe demo --builtin-stories 60 --tokenizer bpe:300".split()) == 0
    assert main(["prepare", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "every checksum and count is right\ndata/train.bin: 60 stories" in out
    with open("data/train.bin", "r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    assert main(["prepare", "--verify"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("storyllm: data/train.bin is damaged: its sha256 is")
    assert error.count("\n") == 1
    assert main(["prepare", "--verify", "--out", "nowhere"]) == 2


@pytest.mark.parametrize("arguments", ["train --train.max-itres 5", "telll", "train --train.max-iters many", ""])
def test_a_misspelt_option_is_code_2_too(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_long_prompt_is_a_warning_in_one_line(run, capsys):
    assert main(["tell", "--checkpoint", str(run / "last.pt"), "--max-new-tokens", "2", "One fine day " * 20]) == 0
    error = capsys.readouterr().err
    assert re.fullmatch(r"storyllm: prompt has \d+ tokens, the context is 16: it is cut to its last 16\n", error)


def test_output_into_a_closed_pipe_is_no_error(run):
    command = f"{sys.executable} -m storyllm tell --checkpoint {run}/last.pt --max-new-tokens 60 'One day' | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(storyllm.__file__).parents[1])
    assert done.stderr == ""


def test_of_two_recipes_the_last_counts(capsys):
    assert main(["train", "--recipe", "demo", "--recipe", "demmo"]) == 2
    assert "there is no recipe 'demmo'" in capsys.readouterr().err


def test_options_are_checked_before_the_story_begins(run, capsys):
    assert main(["tell", "--checkpoint", str(run / "last.pt"), "--temperature", "-1", "One day"]) == 2
    assert capsys.readouterr().out == ""
