"""Which tools a chat offers, and whether one has to be called."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.tools import NamedToolChoice, ToolChoice, ToolDefinition

__all__ = ["NO_TOOLS", "OfferedTool", "ToolUse", "tool_use"]


@dataclass(frozen=True, slots=True)
class OfferedTool:
    name: str
    parameters: dict[str, object]  # a JSON schema
    strict: bool
    shown: dict[str, object]  # to the chat template


@dataclass(frozen=True, slots=True)
class ToolUse:
    tools: tuple[OfferedTool, ...] = ()
    required: bool = False  # at least one call
    parallel: bool = True  # several calls are allowed

    @property
    def shown(self) -> list[dict[str, object]]:
        return [tool.shown for tool in self.tools]

    @property
    def constrained(self) -> bool:
        return self.required or any(tool.strict for tool in self.tools)


NO_TOOLS = ToolUse()


def tool_use(
    tools: list[ToolDefinition] | None,
    choice: ToolChoice | None = None,
    *,
    parallel: bool | None = None,
) -> ToolUse:
    """Raises ApiError (400). A named tool is the only one that is offered."""
    tools = tools or []
    _check_names(tools)
    if isinstance(choice, NamedToolChoice):
        tools = [_named(tools, choice.function.name)]
    elif choice == "required" and not tools:
        raise invalid("tool_choice 'required' needs tools", "tool_choice")
    elif choice == "none" or not tools:
        return NO_TOOLS
    return ToolUse(
        tuple(_offered(tool) for tool in tools),
        required=choice == "required" or isinstance(choice, NamedToolChoice),
        parallel=parallel is not False,
    )


def _check_names(tools: list[ToolDefinition]) -> None:
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        if tool.function.name in seen:
            raise invalid(
                f"two tools are called {tool.function.name!r}; give each a name of its own",
                f"tools[{number}].function.name",
            )
        seen.add(tool.function.name)


def _named(tools: list[ToolDefinition], name: str) -> ToolDefinition:
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools) or "none"
    raise invalid(f"tool_choice names {name!r}, which is not among tools ({known})", "tool_choice")


def _offered(tool: ToolDefinition) -> OfferedTool:
    function = tool.function
    parameters: dict[str, object] = {"type": "object", "properties": {}}
    if function.parameters is not None:
        parameters = dict(function.parameters)
    shown: dict[str, object] = {"name": function.name}
    if function.description is not None:
        shown["description"] = function.description
    shown["parameters"] = parameters
    return OfferedTool(
        function.name,
        parameters,
        bool(function.strict),
        {"type": "function", "function": shown},
    )
