"""Writes docs/settings.md from the declarations: `python -m docs.site.settings_page`."""

from loraplex_server.options import Panel
from loraplex_server.settings.sources import server_options

_HEAD = """# Settings

Every option of `loraplex serve` has one name in three places: `--max-model-len` on the command
line, `LORAPLEX_MAX_MODEL_LEN` in the environment, `max-model-len:` in the YAML file that `--config`
names. The command line wins over the environment, the environment over the file. Lists take commas.
A switch has two forms on the command line: `--demos` and `--no-demos`. Sizes are in bytes, or as
`512MiB` and `2GB`. This page is made by `python -m docs.site.settings_page`.
"""


def settings_page() -> str:
    lines = [_HEAD]
    for panel in Panel:
        lines += [f"## {panel}\n", "| option | default | |", "| --- | --- | --- |"]
        for option in server_options():
            if option.panel is panel:
                help_text = option.help.replace("|", "\\|")
                lines.append(f"| `{option.dashed}` | {option.default} | {help_text} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_page(), end="")
