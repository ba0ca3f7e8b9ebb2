"""Weights of other libraries in, and ours out to them.

    layouts        tables: the names that each library gives to the parts of a ViT
    families       tables: what tensors cannot tell of each family, and what is refused
    reading        a file, a folder or a Hub id becomes named tensors, and the config beside them; nothing is unpickled
    architectures  tables: timm's architectures, and its arguments as fields of ours
    recognition    whose the tensors are, told by their names, or refused
    planning       which tensor goes where, and the config that describes the model
    loading        the model, filled; positions of another size resized; a new head
    processors     the image processor and the class names that belong to it
    targets        what models of other libraries can hold, and their configs for one of ours
    exporting      our tensors under another library's names
    proof          the other library's own model beside ours, block by block
    catalogue      the list of what is understood, and what a checkpoint is

`convert_checkpoint` is the way in, `export_checkpoint` the way out.
"""

from .exporting import export_checkpoint
from .loading import PACKAGED_MODEL, convert_checkpoint
from .processors import image_processor_for
from .proof import verify_checkpoint, verify_export

__all__ = [
    "PACKAGED_MODEL",
    "convert_checkpoint",
    "export_checkpoint",
    "image_processor_for",
    "verify_checkpoint",
    "verify_export",
]
