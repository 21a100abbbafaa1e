"""Checkpoints: how ours are saved and go on, and how any are opened, foreign ones too. All are hostile input."""
