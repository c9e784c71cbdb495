"""The tools that a chat offers, and whether the answer must call one."""

from dataclasses import dataclass

from loraplex_server.api.protocol.tools import NamedToolChoice, ToolChoice, ToolDefinition
from loraplex_server.errors import invalid


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool that the answer may call."""

    name: str
    parameters: dict[str, object]  # a JSON schema
    strict: bool
    shown: dict[str, object]  # to the chat template


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a chat, and the rules of calling them."""

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
    """Return the tools to offer: only the named one if ``choice`` names a tool.

    Raises ApiError (400).
    """
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
