"""How good a model and its stories are."""
