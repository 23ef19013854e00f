"""Data: from the text of stories to token ids in files, and to windows of them for training and evaluation."""
