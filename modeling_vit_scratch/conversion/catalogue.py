"""What is understood: a list of families, and what a given checkpoint is."""

import logging
import re

from ..configuration_vit_scratch import ViTScratchConfig
from .architectures import REFUSED_ARCHITECTURES, UNDERSTOOD, Untold, family_of
from .families import FAMILIES, MODEL_TYPES
from .loading import find_own_folder
from .planning import make_plan
from .reading import locate, open_checkpoint, silent
from .recognition import recognise

logger = logging.getLogger(__package__)


def families() -> list[tuple[str, str, str]]:
    """(source, transformers' model types, whose names its tensors may have) for all that is understood."""
    rows = []
    for source, family in FAMILIES.items():
        types = ", ".join(name for name, of in MODEL_TYPES.items() if of == source)
        rows.append((source, types or "-", ", ".join(layout.title for layout in family.layouts)))
    return rows


def architectures() -> list[tuple[str, str]]:
    """(family, timm's architectures) for all of timm's that is understood."""
    return [(title, braces(pattern)) for title, pattern in UNDERSTOOD.items()]


def refused() -> list[tuple[str, str]]:
    """(timm's architectures, what they have that this model has not)."""
    return [(braces(pattern), what) for pattern, what in REFUSED_ARCHITECTURES.items()]


def braces(pattern: str) -> str:
    """A pattern of architectures as a shell writes it: (a|b) is {a,b}, (a)? is {,a}, any number N, anything *."""
    text = pattern.replace(r"\d+", "N").replace(".*", "*")
    text = re.sub(r"\[(\w)(\w)\]", r"{\1,\2}", text)
    text = re.sub(r"\(([^()]*)\)\?", r"{,\1}", text)
    text = re.sub(r"(\w)\?", r"{,\1}", text)
    text = re.sub(r"[()]", lambda found: "{" if found[0] == "(" else "}", text)
    inside, result = 0, ""
    for letter in text:
        inside += (letter == "{") - (letter == "}")
        result += ("," if inside else " ") if letter == "|" else letter
    return result


def describe_checkpoint(checkpoint, source: str | None = None, revision: str | None = None, **hints) -> dict[str, str]:
    """What a checkpoint is, and the fields of our config that make it, as far as they are not the default.

    Args:
        checkpoint: As for `convert_checkpoint`, like the others.

    Raises:
        ValueError: As `convert_checkpoint`, with the reason why it is refused.
    """
    located = locate(checkpoint, revision=revision)
    own = find_own_folder(located) if source is None else None
    if own is not None:
        return {"is": "this package's own", **_differences(ViTScratchConfig.from_pretrained(own))}
    with silent(logger):
        opened = open_checkpoint(located, str(checkpoint), mmap=True)
        family, named = recognise(opened, source)
        try:
            plan = make_plan(opened, family, named, hints, new_head=False)
        except Untold as error:
            return {"is": family, "names": named.layout.title, "asked for": str(error)}
    architecture = opened.config.get("architecture")
    kind = f"{family} (timm's {architecture}: {family_of(architecture) or 'not known'})" if architecture else family
    head = "none" if plan.classes is None else f"{plan.classes} classes"
    left_out = ", ".join(dict.fromkeys(plan.left_out.values()))
    facts = {"is": kind, "names": named.layout.title, "head": head}
    facts |= {"left out": left_out} if left_out else {}
    return {**facts, **_differences(ViTScratchConfig(**plan.fields))}


def _differences(config: ViTScratchConfig) -> dict[str, str]:
    plain = ViTScratchConfig()
    names = [name for name in plain.__class__.__annotations__ if hasattr(plain, name)]
    return {name: str(getattr(config, name)) for name in names if getattr(config, name) != getattr(plain, name)}
