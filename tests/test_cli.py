"""The command line: every command end to end, help, and one-line errors with exit code 2."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY_MODEL_OPTIONS, flip_bit

import storyllm
from storyllm import RECIPES, DataConfig, GPTConfig, TrainConfig, read_log
from storyllm.cli import main

COMMANDS = ("prepare", "train", "generate", "evaluate", "judge", "plot", "export")
TRAIN = ["train", "--recipe", "demo", *TINY_MODEL_OPTIONS]
TRAIN += "--train.batch-size 2 --train.eval-windows 4 --train.device cpu --train.max-iters 6".split()


def output_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The standard output of a successful command."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a model trained from the command line."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoints"
    assert main([*TRAIN, "--data-dir", str(tiny_data), "--checkpoint-dir", str(folder)]) == 0
    return folder


def test_all_commands_work_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = "prepare --recipe demo --synthetic-stories 300 --tokenizer bpe:400".split()
    assert "data/train.bin: 300 stories" in output_of(capsys, *prepare)
    assert "data/train.bin: 300 stories" in output_of(capsys, *prepare)  # nothing to do
    printed = output_of(capsys, *TRAIN)
    assert re.search(r"best validation loss \d\.\d{4} \(\d\.\d{4} bits per byte\) at iteration \d", printed)
    generate = ["generate", "--max-new-tokens", "5", "--seed", "1", "Once upon a time"]
    story = output_of(capsys, *generate)
    assert story.startswith("Once upon a time") and story.endswith("\n")
    assert output_of(capsys, *generate) == story
    assert output_of(capsys, "generate", "--num-stories", "3", "--max-new-tokens", "5", "A pig").count("A pig") == 3
    assert {"loss", "perplexity", "bits per byte"} <= set(
        re.findall("^loss|^perplexity|^bits per byte", output_of(capsys, "evaluate"), re.MULTILINE)
    )
    assert output_of(capsys, "plot") == "losses.png\n"
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "checkpoints" / "log.jsonl").read_bytes())
    output_of(capsys, *"plot checkpoints copy.jsonl --out both.png".split())
    for name in ("losses.png", "both.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert files == {"best_model_params.pt", "last.1.pt", "last.pt", "log.jsonl"}


def test_options_and_recipe_defaults_reach_the_run(run):
    recipe = storyllm.Recipe.from_dict(read_log(run / "log.jsonl").run["recipe"])
    assert recipe.model == dataclasses.replace(
        RECIPES["demo"].model, vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32
    )
    assert recipe.train == dataclasses.replace(
        RECIPES["demo"].train, batch_size=2, eval_windows=4, device="cpu", max_iters=6
    )


def test_a_folder_stands_for_its_file(run, tiny_data, capsys):
    for options in ([], ["--data", str(tiny_data / "validation.bin")]):
        command = ["evaluate", "--checkpoint", str(run), "--data", str(tiny_data), *options]
        assert "nats per token" in output_of(capsys, *command)
    generate = ["generate", "--max-new-tokens", "3", "--temperature", "0", "--checkpoint"]
    assert output_of(capsys, *generate, str(run)) == output_of(capsys, *generate, str(run / "best_model_params.pt"))


@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "int8"])
def test_stories_are_generated_with_other_weights(weights, run, capsys):
    command = ["generate", "--max-new-tokens", "3", "--checkpoint", str(run), "--weights", weights, "One day"]
    assert output_of(capsys, *command).startswith("One day")


def test_a_terminal_shows_stories_with_lines_broken_at_words(run, capsys, monkeypatch):
    command = ["generate", "--checkpoint", str(run), "--max-new-tokens", "80", "--seed", "2", "One day Mia"]
    piped = output_of(capsys, *command)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "24")
    shown = output_of(capsys, *command)
    assert shown.count("\n") > piped.count("\n")
    assert re.split("[ \n]+", shown) == re.split("[ \n]+", piped)


def test_stories_are_judged_and_rated(run, tiny_data, tmp_path, capsys):
    pytest.importorskip("sacrebleu", reason='sacrebleu is not installed (pip install "storyllm[judge]")')
    out = tmp_path / "report"
    judge = ["judge", "--data", str(tiny_data), "--out", str(out)]
    checkpoints = ["--checkpoint", str(run), "--checkpoint", str(run / "last.pt")]
    printed = output_of(capsys, *judge, *checkpoints, "--beginnings", "2", "--max-new-tokens", "5", "--seed", "3")
    assert re.search(r"checkpoints +checkpoints/last\.pt +real stories +random ending\nbits per byte ", printed)
    assert printed.endswith(f"{out / 'report.html'}\n")
    assert json.loads((out / "report.json").read_text())["settings"]["seed"] == 3
    sheets = output_of(capsys, *judge, "--sheet", "--raters", "2", "--rated", "1").splitlines()
    assert sheets == [str(out / "rater-1.html"), str(out / "rater-2.html")]
    stories = [json.loads(line)["id"] for line in (out / "stories.jsonl").read_text().splitlines()]
    scores = {"grammar": 8, "creativity": 3, "consistency": 5, "plot": 4, "age": "B", "comment": ""}
    ratings = {"rater": "rater-1", "ratings": [{"story": story, **scores} for story in stories]}
    (tmp_path / "rater-1.json").write_text(json.dumps(ratings))
    assert "real stories" in output_of(capsys, *judge, "--ratings", str(tmp_path / "rater-1.json"))
    assert main([*judge, *checkpoints]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_complete_the_options_of_every_command(shell, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--tyro-print-completion", shell])
    assert not caught.value.code
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--train.max-iters", "--num-stories"):
        assert word in script


def test_a_finished_run_is_success(run, tiny_data, capsys):
    printed = output_of(capsys, *TRAIN, "--data-dir", str(tiny_data), "--checkpoint-dir", str(run))
    assert "already finished" in printed
    assert "best validation loss" in printed


# Help


def test_help_lists_the_commands(capsys):
    text = help_of(capsys)
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    text = help_of(capsys, command)
    assert f"storyllm {command}" in text
    positional = {"generate": "beginning of the story", "plot": "logs written by"}
    assert positional.get(command, "") in text
    options = " ".join(re.sub("[│╭╰─╮╯]", "", text).split())
    assert re.findall(r"(--[\w.-]+) (?:[A-Z]+\|)?(?:{\S+}\S*|[A-Z]+) \(default", options) == []  # no description
    assert "dataclass" not in text and "StoryLLMError" not in text and "Raises" not in text


@pytest.mark.parametrize(
    ("command", "prefix", "config"),
    [("train", "--model.", GPTConfig), ("train", "--train.", TrainConfig), ("prepare", "--", DataConfig)],
)
def test_every_field_of_a_recipe_is_an_option(command, prefix, config, capsys):
    text = help_of(capsys, command)
    options = {field.name: prefix + field.name.replace("_", "-") in text for field in dataclasses.fields(config)}
    assert [name for name, shown in options.items() if not shown] == (["vocab_size"] if config is GPTConfig else [])


@pytest.mark.parametrize("name", ["faithful", "demo"])
@pytest.mark.parametrize("style", ["--recipe {}", "--recipe={}", "--recipe fast --recipe {}"])
def test_help_shows_the_defaults_of_the_recipe(name, style, capsys):
    text = help_of(capsys, "train", *style.format(name).split())
    assert f"(default: {RECIPES[name].train.max_iters})" in text
    assert f"(default: {RECIPES[name].model.n_embd})" in text


def test_version(capsys):
    assert output_of(capsys, "--version") == f"storyllm {storyllm.__version__}\n"


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --recipe fathful", ["'fathful'", "faithful", "demo"]),
        ("train --recipe demo --recipe demmo", ["'demmo'"]),  # the last one counts
        ("train --model.n-embd 100", ["n_embd is 100", "n_head"]),
        ("train --train.learning-rate -1", ["learning_rate is -1.0"]),
        ("train --data-dir missing", ["missing/train.bin", "storyllm prepare"]),
        ("prepare --tokenizer bpe:many", ["'bpe:many'", "bpe:N"]),
        ("prepare --source missing.txt", ["missing.txt"]),
        ("prepare --verify --out missing", ["missing/train.bin"]),
        ("generate --checkpoint missing.pt", ["missing.pt"]),
        ("generate --top-p 1.5 --checkpoint {run}/last.pt", ["top_p is 1.5"]),
        ("generate --temperature -1 --checkpoint {run}/last.pt Hello", ["temperature is -1.0"]),
        ("generate --num-stories 0 --checkpoint {run}/last.pt", ["num_stories is 0"]),
        ("generate --device tpu --checkpoint {run}/last.pt", ["'tpu'"]),
        ("evaluate --checkpoint {run}/last.pt --data missing.bin", ["missing.bin"]),
        ("judge --checkpoint {run} --data missing", ["missing/train.bin"]),
        ("judge --checkpoint {run} --checkpoint {run}/best_model_params.pt", ["twice"]),
        ("judge --checkpoint {run} --beginnings 1", ["beginnings is 1"]),
        ("judge --checkpoint {run} --seed -1", ["seed is -1"]),
        ("judge --checkpoint {run} --temperature -1", ["temperature is -1.0"]),
        ("judge --sheet --out missing", ["missing/stories.jsonl", "storyllm judge"]),
        ("judge --ratings missing.json --out missing", ["missing/stories.jsonl", "storyllm judge"]),
        ("plot missing.jsonl", ["missing.jsonl"]),
        ("plot {run}/log.jsonl --out /proc/missing/losses.png", ["/proc/missing"]),
    ],
)
def test_invalid_input_is_a_one_line_error(arguments, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.format(run=run).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("storyllm: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["train --train.max-itres 5", "generat", "train --train.max-iters many", "train --recipe", ""]
)
def test_a_misspelled_option_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_verify_reports_intact_and_corrupted_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output_of(capsys, *"prepare --recipe demo --synthetic-stories 60 --tokenizer bpe:300".split())
    printed = output_of(capsys, "prepare", "--verify")
    assert "checksums" in printed and "data/train.bin: 60 stories" in printed
    flip_bit(tmp_path / "data" / "train.bin", 100)
    assert main(["prepare", "--verify"]) == 2
    error = capsys.readouterr().err
    assert "data/train.bin is corrupted" in error
    assert error.count("\n") == 1


def test_other_data_is_only_overwritten_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare = "prepare --recipe demo --tokenizer bpe:300 --synthetic-stories".split()
    output_of(capsys, *prepare, "60")
    assert main([*prepare, "70"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert "70 stories" in output_of(capsys, *prepare, "70", "--overwrite")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(run, capsys):
    long_prompt = "One fine day " * 20
    assert main(["generate", "--checkpoint", str(run / "last.pt"), "--max-new-tokens", "2", long_prompt]) == 0
    error = capsys.readouterr().err
    assert re.fullmatch(r"storyllm: .*prompt.*\b16\b.*\nstoryllm: the story did not end .*\b2\b.*\n", error)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_has_the_exit_code_of_the_signal(
    signum, code, tiny_data, tmp_path, monkeypatch, capsys
):
    clip = torch.nn.utils.clip_grad_norm_
    # Called once per update.
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: signal.raise_signal(signum) or clip(*a))
    assert main([*TRAIN, "--data-dir", str(tiny_data), "--checkpoint-dir", str(tmp_path / "run")]) == code
    assert "same command again" in capsys.readouterr().out
    assert read_log(tmp_path / "run" / "log.jsonl").updates[-1]["iteration"] == 1


@pytest.mark.parametrize(
    ("signum", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_other_interrupted_commands_print_one_line(signum, code, word, run, monkeypatch, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(torch, "load", lambda *_, **__: signal.raise_signal(signum))
    assert main(["generate", "--checkpoint", str(run / "last.pt")]) == code
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_control_characters_are_not_printed(run, capsys):
    printed = output_of(capsys, "generate", "--checkpoint", str(run / "last.pt"), "--max-new-tokens", "1", "\x1b[2J")
    assert printed.startswith(r"\x1b[2J")
    assert main(["generate", "--checkpoint", "\x1b[2J.pt"]) == 2
    assert r"\x1b[2J.pt" in capsys.readouterr().err
