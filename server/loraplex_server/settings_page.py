"""docs/settings.md, made from the declarations: `python -m loraplex_server.settings_page`."""

from __future__ import annotations

from .options import Option, Panel
from .settings_sources import server_options

__all__ = ["default_of", "settings_page"]

_HEAD = """# Settings

Every option of `loraplex serve` has one name in three places: `--max-model-len` on the command
line, `LORAPLEX_MAX_MODEL_LEN` in the environment, `max-model-len:` in the YAML file that `--config`
names. The command line wins over the environment, the environment over the file. Lists take commas.
What is on or off has two forms on the command line: `--demos` and `--no-demos`.
This page is made by `python -m loraplex_server.settings_page`.
"""


def default_of(option: Option) -> str:
    """For people; empty where the help itself tells it, or nothing is the default."""
    default = option.info.default
    if default is None or default == () or "Default:" in option.help:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if option.metavar == "SIZE":
        return f"{default >> 30}GiB" if default >= 1 << 30 else f"{default >> 20}MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


def settings_page() -> str:
    lines = [_HEAD]
    for panel in Panel:
        lines += [f"## {panel}\n", "| option | default | |", "| --- | --- | --- |"]
        for option in server_options():
            if option.panel is panel:
                help_text = option.help.replace("|", "\\|")
                lines.append(f"| `{option.dashed}` | {default_of(option)} | {help_text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_page(), end="")
