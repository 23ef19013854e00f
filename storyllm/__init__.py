"""StoryLLM trains a small GPT from scratch to write children's stories."""

from . import openmp as _openmp  # noqa: F401  (before torch is imported)
from .config import DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig
from .data.prepare import prepare
from .data.shards import merge_shards, prepare_shard
from .data.stories import read_stories
from .data.token_file import load_tokenizer, open_token_file, verify
from .evaluation.comparison import StoryReport
from .evaluation.likelihood import Report, evaluate
from .evaluation.ratings import RatingReport, rating_report, write_rating_sheets
from .evaluation.report import judge
from .export.gguf_file import export_gguf
from .export.hugging_face import export_hugging_face, push_to_hub
from .export.web_page import export_page, playground
from .model.gpt import GPT
from .model.sampling import next_token_probs
from .plots.architecture import plot_architecture
from .plots.internals import nearest_tokens, plot_attention, plot_position_similarity
from .plots.loss_curves import plot_losses, plot_runs
from .plots.predictions import plot_loss_by_position, plot_next_tokens
from .plots.text import plot_nearest_story, plot_surprisal, plot_tokens
from .recipes import RECIPES, get_recipe
from .storyteller import Storyteller, load, wrap
from .training.launch import train_parallel
from .training.log import Log, read_log
from .training.loop import train
from .training.optimizer import lr_at
from .training.samples import samples_table

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "RECIPES",
    "DataConfig",
    "GPTConfig",
    "Log",
    "RatingReport",
    "Recipe",
    "Report",
    "StoryLLMError",
    "StoryReport",
    "Storyteller",
    "TrainConfig",
    "evaluate",
    "export_gguf",
    "export_hugging_face",
    "export_page",
    "get_recipe",
    "judge",
    "load",
    "load_tokenizer",
    "lr_at",
    "merge_shards",
    "nearest_tokens",
    "next_token_probs",
    "open_token_file",
    "playground",
    "plot_architecture",
    "plot_attention",
    "plot_loss_by_position",
    "plot_losses",
    "plot_nearest_story",
    "plot_next_tokens",
    "plot_position_similarity",
    "plot_runs",
    "plot_surprisal",
    "plot_tokens",
    "prepare",
    "prepare_shard",
    "push_to_hub",
    "rating_report",
    "read_log",
    "read_stories",
    "samples_table",
    "train",
    "train_parallel",
    "verify",
    "wrap",
    "write_rating_sheets",
]
