"""StoryLLM trains a small GPT from scratch to write children's stories."""

from . import openmp as _openmp  # noqa: F401  (before torch is imported)
from .config import DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig
from .data.prepare import prepare
from .data.stories import read_stories
from .data.token_file import load_tokenizer, open_token_file, verify
from .evaluation.comparison import StoryReport
from .evaluation.likelihood import Report, evaluate
from .evaluation.ratings import RatingReport, rating_report, write_rating_sheets
from .evaluation.report import judge
from .model.gpt import GPT
from .model.sampling import next_token_probs
from .plots.architecture import plot_architecture
from .plots.loss_curves import plot_losses, plot_runs
from .recipes import RECIPES, get_recipe
from .storyteller import Storyteller, load, wrap
from .training.log import Log, read_log
from .training.loop import train
from .training.optimizer import lr_at

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
    "get_recipe",
    "judge",
    "load",
    "load_tokenizer",
    "lr_at",
    "next_token_probs",
    "open_token_file",
    "plot_architecture",
    "plot_losses",
    "plot_runs",
    "prepare",
    "rating_report",
    "read_log",
    "read_stories",
    "train",
    "verify",
    "wrap",
    "write_rating_sheets",
]
