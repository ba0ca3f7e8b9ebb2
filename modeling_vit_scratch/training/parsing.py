"""What options say in text: fields of a config, and times."""

import re

import yaml


def config_fields(text: str | None) -> dict:
    """The fields of a config that `--config_overrides field=value,field=value` names, with their values."""
    fields = {}
    for item in filter(None, re.split(r",(?![^\[]*\])", text or "")):  # no comma of a list
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"config_overrides: {item!r} is not of the form field=value.")
        name = name.strip()
        if name in ("source", "revision", "cache_dir", "token", "replace_head"):  # keywords of `convert_checkpoint`
            raise ValueError(f"config_overrides: {name} is no field of the config; --help lists the options.")
        value = yaml.safe_load(value)
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.IGNORECASE):
            value = float(value)  # which YAML takes for text, since it has no point
        fields[name] = value
    return fields


def parse_duration(text: str) -> float:
    """Seconds of a time such as "90", "90s", "10m" or "1h30m".

    Raises:
        ValueError: The text has another form, or is no time at all.
    """
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))
    except (AttributeError, ValueError):
        seconds = 0
    if seconds <= 0:
        raise ValueError(f"time_budget ({text!r}) must be a time above zero such as 90s, 10m or 1h30m.")
    return seconds
