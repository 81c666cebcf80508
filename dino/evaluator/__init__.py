"""What a backbone has learned: k-NN, probes, fine-tuning, figures without labels."""

from dino.evaluator.knn import KNN, NoEvaluator

__all__ = ["KNN", "NoEvaluator"]
