"""How good a model is: metrics of its outputs, probes of its frozen features."""
