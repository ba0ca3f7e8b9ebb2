"""A trained folder on the Hub and back.

    masking     tokens and local paths taken out of texts and commands
    model_card  README.md, from config.json, metrics.json and plots/
    folder      what a folder must hold, and what of it is sent; refused before anything is
    push        one commit for everything, or none
    space       a page for the model, as a Space
    callback    every checkpoint pushed, in the background of a training
    probe       what a model computes, to be run here and elsewhere
    proof       the repository pulled and run in a clean process, every bit compared

A folder is pushed whole or not at all. A token is never shown, and never sent in a file.
"""

from .callback import HubPushCallback
from .folder import FolderError, check_folder, list_folder
from .masking import mask_tokens, public_command
from .model_card import write_model_card
from .proof import Verified, verify_repo
from .push import HubError, Pushed, prepare_repo, push_folder
from .space import push_space

__all__ = [
    "FolderError", "HubError", "HubPushCallback", "Pushed", "Verified", "check_folder", "list_folder", "mask_tokens",
    "prepare_repo", "public_command", "push_folder", "push_space", "verify_repo", "write_model_card",
]  # fmt: skip
