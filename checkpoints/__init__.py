"""Whose checkpoints are opened for use: ours, and the authors', EAT's and SSLAM's. All are hostile input."""
