"""StoryLLM: a small GPT that learns from scratch to tell children's stories, and tells them."""

from .config import RECIPES, DataConfig, GPTConfig, Recipe, StoryLLMError, TrainConfig, get_recipe
from .evaluation import Report, evaluate
from .generation import Storyteller, load
from .log import Log, read_log
from .model import GPT
from .optim import lr_at
from .plots import draw_flowchart, plot_losses, plot_runs
from .sampling import next_token_probs
from .stories import read_stories
from .tokens import open_tokens, prepare, read_tokenizer, verify
from .training import train

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "RECIPES",
    "DataConfig",
    "GPTConfig",
    "Log",
    "Recipe",
    "Report",
    "StoryLLMError",
    "Storyteller",
    "TrainConfig",
    "draw_flowchart",
    "evaluate",
    "get_recipe",
    "load",
    "lr_at",
    "next_token_probs",
    "open_tokens",
    "plot_losses",
    "plot_runs",
    "prepare",
    "read_log",
    "read_stories",
    "read_tokenizer",
    "train",
    "verify",
]
