"""An exported folder opens in transformers, with the same ids, logits and stories, and is complete or not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY

import storyllm
from storyllm import GPT, StoryLLMError, export_hugging_face, load, load_tokenizer, push_to_hub
from storyllm.checkpoint import load_checkpoint, model_contents, save_checkpoint
from storyllm.cli import main
from storyllm.data.tokenizer import END_OF_TEXT, gpt2_tokenizer, tokenizer_hash

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "README.md",
}
IDX = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))


def save_model(path: Path, tokenizer: Any, **changes: Any) -> Path:
    """A checkpoint with random weights, large enough that a wrong activation or a missing bias is noticed."""
    recipe = TINY.override({"model.vocab_size": tokenizer.n_vocab, **{f"model.{k}": v for k, v in changes.items()}})
    torch.manual_seed(0)
    model = GPT(recipe.model)
    for parameter in model.transformer["h"].parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    save_checkpoint(path, model_contents(model, tokenizer, recipe))
    return path


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the best model of `tiny_run`. Read-only."""
    folder = tmp_path_factory.mktemp("exported") / "tiny-stories"
    export_hugging_face(tiny_run, folder)
    return folder


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"activation": "gelu_tanh", "n_head": 4}])
def test_transformers_computes_the_same_logits(tiny_data, tmp_path, changes):
    checkpoint = save_model(tmp_path / "model.pt", load_tokenizer(tiny_data), **changes)
    export_hugging_face(checkpoint, tmp_path / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        expected, _ = load(checkpoint, device="cpu").model(IDX)
        torch.testing.assert_close(model(IDX).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", ["bpe", "gpt2"])
def test_a_pipeline_generates_the_same_greedy_story(vocabulary, tiny_data, tmp_path, request):
    if vocabulary == "gpt2":
        request.getfixturevalue("gpt2_cache")
    tokenizer = gpt2_tokenizer() if vocabulary == "gpt2" else load_tokenizer(tiny_data)
    checkpoint = save_model(tmp_path / "model.pt", tokenizer, block_size=32)
    export_hugging_face(checkpoint, tmp_path / "exported")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "exported"), device="cpu")
    for prompt in ("One day", "Zoë found 🐌"):
        new_tokens = 32 - len(tokenizer.encode_ordinary(prompt))  # to the end of the context
        story = load(checkpoint, device="cpu").generate(prompt, max_new_tokens=new_tokens, temperature=0.0)
        assert pipeline(prompt, do_sample=False)[0]["generated_text"] == story


def test_the_tokenizer_gives_the_same_ids(exported, tiny_run):
    """`tests/data/test_tokenizer_json.py` compares the ids of random texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    own = load(tiny_run).tokenizer
    for text in ("", " Two  spaces. don't\n\n", "Zoë 🐌 日本語", "aaaa" * 9):
        assert tokenizer(text)["input_ids"] == own.encode_ordinary(text)
        assert tokenizer.decode(own.encode_ordinary(text)) == text
    assert tokenizer(END_OF_TEXT)["input_ids"] == [own.eot_token]
    assert tokenizer(END_OF_TEXT, split_special_tokens=True)["input_ids"] == own.encode_ordinary(END_OF_TEXT)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (own.eot_token, own.eot_token)
    assert tokenizer.model_max_length == TINY.model.block_size


def test_an_export_comes_back(exported, tiny_run):
    model, original = (load(path, device="cpu") for path in (exported, tiny_run))
    assert model.model.config.block_size == TINY.model.block_size
    assert model.model.config.dropout == TINY.model.dropout
    assert tokenizer_hash(model.tokenizer) == tokenizer_hash(original.tokenizer)
    for name, weight in original.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], weight), name


# Model card


def test_all_files_of_an_export_have_the_same_permissions(exported):
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1


def test_the_model_card_describes_the_run(exported, tiny_run, tiny_data):
    assert {path.name for path in exported.iterdir()} == FILES
    card = (exported / "README.md").read_text()
    best = min(storyllm.read_log(tiny_run / "log.jsonl").evaluations, key=lambda entry: entry["val_loss"])
    tokens = best["iteration"] * TINY.train.batch_size * TINY.model.block_size
    for fact in (
        "# tiny-stories",
        f"| iterations | {best['iteration']} of 22 |",
        f"| tokens | {tokens:,} ",
        f"| training loss | {best['train_loss']:.4f} nats per token |",
        f"| validation loss | {best['val_loss']:.4f} nats per token |",
        f"| bits per byte | {best['val_bits_per_byte']:.4f} |",
        "| data | `stories.txt`, 360 stories |",
        "| license of the data | unknown |",
        '"learning_rate": 0.01',
        'pipeline("text-generation", "tiny-stories")',
    ):
        assert fact in card
    assert str(tiny_data.parent) not in card  # nothing about this machine's folders


@pytest.mark.parametrize(
    ("source", "facts"),
    [
        ("roneneldan/TinyStories", ["datasets:\n- roneneldan/TinyStories\n---", "of the data | CDLA-Sharing-1.0 |"]),
        ("someone/stories", ["- storyllm\n---", "| data | `stories` |", "of the data | unknown |"]),  # perhaps a folder
        ("synthetic", ["of the data | none: written by StoryLLM's own generator |"]),
    ],
)
def test_the_model_card_names_the_license_of_the_data(source, facts, tiny_run, tmp_path):
    contents = load_checkpoint(tiny_run / "best_model_params.pt")
    contents["recipe"]["data"]["source"] = source
    save_checkpoint(tmp_path / "model.pt", contents)  # without a log next to it
    export_hugging_face(tmp_path / "model.pt", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    for fact in facts:
        assert fact in card
    assert "| iterations | " in card and "bits per byte" not in card


def test_a_model_of_another_program_can_be_exported(exported, tmp_path):
    export_hugging_face(exported, tmp_path / "again")
    for name in FILES - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert "| training | unknown" in (tmp_path / "again" / "README.md").read_text()


# Files


def test_an_existing_folder_is_only_replaced_on_request(exported, tiny_run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    export_hugging_face(tiny_run, folder)  # it was empty
    (folder / "config.json").write_text("{}")
    with pytest.raises(StoryLLMError, match=r"folder already has files .*--overwrite"):
        export_hugging_face(tiny_run, folder)
    assert (folder / "config.json").read_text() == "{}"
    export_hugging_face(tiny_run, folder, overwrite=True)
    assert (folder / "config.json").read_bytes() == (exported / "config.json").read_bytes()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoryLLMError, match=r"folder already has files \(notes\.txt\); use another folder$"):
        export_hugging_face(tiny_run, folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_no_folder(tiny_run, tmp_path, monkeypatch, error):
    written = []

    def interrupt(path: Path, *_: Any, **__: Any) -> None:
        written.extend(path.parent.iterdir())
        raise error

    monkeypatch.setattr(Path, "write_text", interrupt)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else StoryLLMError
    with pytest.raises(expected):
        export_hugging_face(tiny_run, tmp_path / "exported")
    assert written and not list(tmp_path.iterdir())


def test_what_a_killed_process_left_does_not_matter(tiny_run, tmp_path):
    (tmp_path / ".exported.part").mkdir()
    (tmp_path / ".exported.part" / "model.safetensors").write_bytes(b"half")
    export_hugging_face(tiny_run, tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_missing_checkpoint_leaves_no_folder(tmp_path):
    with pytest.raises(StoryLLMError, match=r"missing\.pt not found"):
        export_hugging_face(tmp_path / "missing.pt", tmp_path / "exported")
    assert not list(tmp_path.iterdir())


# Hub and command line


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub that records what it is asked to do."""
    requests: list[Any] = []
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *a, **k: requests.append(("create", a, k)))
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **k: requests.append(("upload", k)))
    return requests


def test_only_the_files_of_the_export_are_uploaded(exported, tmp_path, hub):
    shutil.copytree(exported, tmp_path / "folder")
    (tmp_path / "folder" / ".env").write_text("HF_TOKEN=secret")
    push_to_hub(tmp_path / "folder", "someone/tiny")
    created, (_, upload) = hub
    assert created == ("create", ("someone/tiny",), {"exist_ok": True})
    assert upload.pop("commit_message")
    assert upload == {
        "repo_id": "someone/tiny",
        "folder_path": tmp_path / "folder",
        "allow_patterns": upload["allow_patterns"],
    }
    assert set(upload["allow_patterns"]) == FILES


def test_the_command_exports_and_uploads(tiny_run, tmp_path, hub, capsys):
    folder = tmp_path / "exported"
    command = ["export", "--checkpoint", str(tiny_run), "--to", str(folder)]
    assert main([*command, "--push", "someone/tiny"]) == 0
    assert capsys.readouterr().out == f"{folder}\nhttps://huggingface.co/someone/tiny\n"
    assert [request[0] for request in hub] == ["create", "upload"]
    assert 'pipeline("text-generation", "someone/tiny")' in (folder / "README.md").read_text()
    assert main(command) == 2
    assert "already has files" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "", "../tiny", "someone/"])
def test_an_invalid_name_is_refused_before_anything_is_written(name, tiny_run, tmp_path, hub, capsys):
    assert main(["export", "--checkpoint", str(tiny_run), "--to", str(tmp_path / "x"), "--push", name]) == 2
    assert "must be OWNER/NAME" in capsys.readouterr().err
    assert not hub and not list(tmp_path.iterdir())


def test_a_failed_upload_is_one_line_without_a_token(exported, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("https://user:hf_secret@huggingface.co")

    monkeypatch.setattr("huggingface_hub.create_repo", fail)
    with pytest.raises(StoryLLMError, match=r"someone/tiny \(ConnectionError\).*hf auth login") as caught:
        push_to_hub(exported, "someone/tiny")
    assert "hf_secret" not in str(caught.value)


def test_an_incomplete_folder_is_not_uploaded(exported, tmp_path, hub):
    shutil.copytree(exported, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").unlink()
    with pytest.raises(StoryLLMError, match=r"tokenizer\.json not found"):
        push_to_hub(tmp_path / "folder", "someone/tiny")
    assert not hub


@pytest.mark.parametrize(("package", "extra"), [("safetensors.torch", "hub"), ("gguf", "gguf")])
def test_a_missing_extra_is_named(package, extra, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, package, None)  # importing it fails
    target, form = (tmp_path / "x.gguf", "gguf") if extra == "gguf" else (tmp_path / "x", "hf")
    command = ["export", "--checkpoint", str(tiny_run), "--to", str(target), "--format", form]
    assert main(command) == 2
    assert f'pip install "storyllm[{extra}]"' in capsys.readouterr().err
