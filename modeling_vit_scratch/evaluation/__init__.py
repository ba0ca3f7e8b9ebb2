"""What a trained model says of images, and how good that is.

    metrics        accuracy, calibration, intervals and tests, from probabilities and labels
    devices        what a device is called, and what it has units for
    token_merging  fewer tokens from block to block, with the same weights
    inference      a model of any library with its image processor: images in, probabilities out
    programs       a model as a file of ONNX or torch.export
    acceleration   the fastest way in which a device runs a model
    reports        a model measured on a split, or two compared there; and that as text
    tables         columns of text for a terminal

`scripts/predict.py` and `scripts/validate.py` are this on a terminal.
"""

from .acceleration import load_for_inference
from .inference import Predictor
from .metrics import ImageClassificationMetrics
from .reports import compare_models, evaluate_model, report_text
from .token_merging import merge_tokens

__all__ = [
    "ImageClassificationMetrics",
    "Predictor",
    "compare_models",
    "evaluate_model",
    "load_for_inference",
    "merge_tokens",
    "report_text",
]
