"""What a trained model says of images, and how good that is.

    metrics    accuracy, calibration, intervals and tests, from probabilities and labels
    inference  a model of any library with its image processor: images in, probabilities out

`scripts/predict.py`, `validate.py` and `plot.py` are this on a terminal.
"""

from .inference import Predictor
from .metrics import ImageClassificationMetrics

__all__ = ["ImageClassificationMetrics", "Predictor"]
