"""What a trained model says of images, and how good that is.

    metrics        accuracy, calibration, intervals and tests, from probabilities and labels
    token_merging  fewer tokens from block to block, with the same weights
    inference      a model of any library with its image processor: images in, probabilities out
    reports        a model measured on a split, or two compared there; and that as text
    tables         columns of text for a terminal

`scripts/predict.py` and `scripts/validate.py` are this on a terminal.
"""

from .inference import Predictor
from .metrics import ImageClassificationMetrics
from .reports import compare_models, evaluate_model, report_text
from .token_merging import merge_tokens

__all__ = [
    "ImageClassificationMetrics",
    "Predictor",
    "compare_models",
    "evaluate_model",
    "merge_tokens",
    "report_text",
]
