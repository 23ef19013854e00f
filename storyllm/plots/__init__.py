"""Figures: loss curves drawn from logs, and the model architecture drawn from its configuration."""
