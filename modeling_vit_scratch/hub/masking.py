"""What must not be seen: tokens, and paths of this machine, taken out of texts and command lines."""

import re
import shlex
from pathlib import Path

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL_PATH = re.compile(r"(?:[/~]|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\)")
_FILE_OF_OURS = re.compile(r"(?:.*[/\\])?(scripts[/\\](?:(?:recipes|launch)[/\\])?[\w.-]+\.(?:py|sh|ya?ml))")
_TOKEN_FLAG = re.compile(r"--?[\w-]*token")
# What a path begins with where the rest of it is cut off, for the reader to put one of their own.
PATH_PLACEHOLDER = "path/to/"


def redact(text: str, token: str | None = None) -> str:
    """The text with everything that looks like a Hub token, and the given one, masked."""
    if token:
        text = text.replace(token, "***")
    return _TOKEN.sub("***", text)


def is_token_flag(word: str) -> bool:
    """Whether a word of a command line is an option whose value is a token."""
    return bool(_TOKEN_FLAG.fullmatch(word))


def mask_tokens(words: list[str]) -> list[str]:
    """A command line's words with `***` in place of what is given to an option of a token, or looks like one."""
    masked, follows = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        if follows:
            masked.append("***")
        else:
            masked.append(f"{flag}=***" if equals and is_token_flag(flag) else redact(word))
        follows = is_token_flag(word) and not follows
    return masked


def public_text(text: str) -> str:
    """The text with tokens masked and, if it is a path outside the working folder, only its last component."""
    return redact(_last_component(text) if _LOCAL_PATH.match(text) else text)


def public_dataset(name) -> tuple[str | None, str | None]:
    """A data set's name as anybody may see it, and its Hub id; None for what there is not."""
    if not isinstance(name, str) or not name.strip():
        return None, None
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name, name
    return redact(_last_component(name)), None


def public_command(command: str, dataset_name: str | None = None) -> str:
    """A command line as anybody may see it: tokens masked, and `path/to/` before the last part of a path outside the
    working folder.

    The program that is run is named without its path, and scripts and recipes of this repository with theirs in it.

    Args:
        command: The command line, quoted as for a shell.
        dataset_name: An argument to shorten even if it is a path below the working folder.
    """
    shown_name, _ = public_dataset(dataset_name)
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    public = []
    for index, word in enumerate(mask_tokens(words)):
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if index == 0:
            value = public_text(value)
        elif _LOCAL_PATH.match(value) or (shown_name and value == dataset_name != shown_name):
            value = _placeholder(value)
        public.append(flag + equals + (value if value == "***" or not value else shlex.quote(redact(value))))
    return " ".join(public).replace("```", "")


def _placeholder(path: str) -> str:
    of_ours = _FILE_OF_OURS.fullmatch(path)
    return of_ours[1].replace("\\", "/") if of_ours else PATH_PLACEHOLDER + _last_component(path, "folder")


def _last_component(path: str, otherwise: str = "local folder") -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else otherwise
