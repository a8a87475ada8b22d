"""How good a trained network is: `fastssl eval` in Python, as `evaluate(run, ...)`."""

from fastssl.evaluation.protocol import evaluate

__all__ = ["evaluate"]
