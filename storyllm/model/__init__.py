"""From token ids to logits to the next token."""
