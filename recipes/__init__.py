"""Recipes of prepare.py, one a file: plan(settings) says which files become which clips of which split."""
