"""Commands whose options are grouped into dataclasses.

    @dataclass(frozen=True)
    class ShapeOptions:
        rank: int = flag(8, "The rank of the factors.", min=1)

    @grouped
    def train(data: Path, shape: ShapeOptions, schedule: ScheduleOptions) -> None: ...

The command line has an option for each field of the dataclasses.
"""

import inspect
from collections.abc import Callable
from dataclasses import Field, field, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer


def flag(default: Any, help_text: str, *names: str, **options: Any) -> Any:
    """Declare a field of a group. ``names`` and ``options`` are those of ``typer.Option``."""
    info = typer.Option(*names, help=help_text, **options)
    return field(default=default, metadata={"option": info})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with a parameter for each field of `command`'s dataclass parameters."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints.get(name))
            )
            continue
        types = get_type_hints(groups[name])
        parameters += [_parameter(field, types[field.name]) for field in fields(groups[name])]

    def ungrouped(**options: Any) -> None:
        arguments = {
            name: group(**{field.name: options.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**options, **arguments)

    ungrouped.__name__, ungrouped.__doc__ = command.__name__, command.__doc__
    ungrouped.__annotations__ = {p.name: p.annotation for p in parameters}
    ungrouped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return ungrouped


def _parameter(option: Field[Any], kind: Any) -> inspect.Parameter:
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=option.default,
        annotation=Annotated[kind, option.metadata["option"]],
    )
