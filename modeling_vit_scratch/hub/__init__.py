"""A trained folder on the Hub and back.

    a run's output folder or a checkpoint -> model_card (writes README.md from config.json, metrics.json and plots/)
      -> folder (refuses what would not load there, before anything is sent)
      -> push (one commit for everything, or none)    <- callback (every checkpoint, in the background of a training)
      -> proof (pulls it in a clean process, compares every bit)

A folder is pushed whole or not at all. A token is never shown, and never sent in a file: masking takes it out.
"""

from .callback import HubPushCallback
from .folder import FolderError, check_folder, list_folder
from .masking import mask_tokens, public_command
from .model_card import write_model_card
from .proof import Verified, verify_repo
from .push import HubError, Pushed, prepare_repo, push_folder

# fmt: off
__all__ = [
    "FolderError", "HubError", "HubPushCallback", "Pushed", "Verified", "check_folder", "list_folder", "mask_tokens",
    "prepare_repo", "public_command", "push_folder", "verify_repo", "write_model_card",
]
