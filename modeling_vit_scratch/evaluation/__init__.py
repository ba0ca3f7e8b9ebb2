"""What a trained model says of images, and how good that is.

    metrics    accuracy, calibration, intervals and tests, from probabilities and labels
    inference  a model of any library with its image processor: images in, probabilities out
    acceleration  the fastest way in which a device runs it
    devices    what a device is called, and what it has units for
    programs   a model as a file of ONNX or torch.export
    reports    a model measured on a split, or two compared there; and that as text
    tables     columns of text for a terminal

`scripts/predict.py` and `scripts/validate.py` are this on a terminal.
"""

from .acceleration import load_for_inference
from .inference import Predictor
from .metrics import ImageClassificationMetrics
from .reports import compare_models, evaluate_model, report_text

__all__ = [
    "ImageClassificationMetrics",
    "Predictor",
    "compare_models",
    "evaluate_model",
    "load_for_inference",
    "report_text",
]
