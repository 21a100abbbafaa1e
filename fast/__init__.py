"""Faster forms of what the stages write as plain expressions; each computes the same numbers up to rounding."""
