"""Evaluation of models by metrics that are independent of them."""
