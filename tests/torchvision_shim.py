"""Make torchvision's wheel importable beside a CPU build of torch, whose operators it was not compiled for.

The wheel registers shape functions for operators that its own library would define; where that library does not load,
importing torchvision fails. Declaring the operators first is enough: models and transforms use none of them.
"""

import torch

DETECTION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
ALIGN = (
    "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor"
)
OPERATORS = {
    "nms": DETECTION,
    "qnms": DETECTION,
    "roi_align": ALIGN,
    "qroi_align": ALIGN,
    **dict.fromkeys(
        (
            "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool", "_roi_pool_backward",
            "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
        ),
        "(Tensor x) -> Tensor",
    ),
}  # fmt: skip

_library = None


def import_torchvision():
    """torchvision, or None where it is not installed or does not import."""
    global _library
    try:
        import torchvision
    except ImportError:
        return None
    except RuntimeError:
        pass
    else:
        return torchvision
    _library = torch.library.Library("torchvision", "DEF")  # kept: its operators vanish with it
    for name, schema in OPERATORS.items():
        _library.define(name + schema)
    try:
        import torchvision
    except (ImportError, RuntimeError):
        return None
    return torchvision


def import_timm():
    """timm, or None where it, or the torchvision it needs, is not installed or does not import."""
    if import_torchvision() is None:
        return None
    try:
        import timm
    except ImportError:
        return None
    return timm
