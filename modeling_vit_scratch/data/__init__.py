"""Images and labels, from wherever they are to batches on the training device.

    sources       a Hub id, a folder or .tar shards become a `datasets` dataset; one image is decoded
    columns       which columns hold images and labels, and what the classes are called
    records       encoded images and checked labels of each split; how validation is cut from train
    splits        decoded once, or image by image in worker processes: uint8 (C, H, W) and a label
    streaming     the same of a dataset that outgrows the disk
    augmentation  a batch, uint8 (B, C, H, W), becomes floating point: cropped, flipped, mixed, normalised
    rand_augment  RandAugment's operations on such a batch
    doctor        what is wrong with a dataset: duplicates, leaks, unbalanced classes; and its fingerprint
    cuts          which images a run held out, read back from its folder and proved by the fingerprint

Pixels stay integers until a batch is augmented. What is random is a function of (seed, step, rank), or of (seed, epoch,
index) for one image, never of the global generator.
"""

from .augmentation import Augmentation
from .cuts import load_split
from .doctor import inspect_splits
from .splits import ImageSplits, load_splits
from .streaming import load_streaming

__all__ = ["Augmentation", "ImageSplits", "inspect_splits", "load_split", "load_splits", "load_streaming"]
