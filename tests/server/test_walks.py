"""The two walks of docs/architecture.md are what happens: a chat and a registration are traced."""

import asyncio
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.support.adapters.lora_files import write_lora
from tests.support.servers.asgi_call import AsgiCall
from tests.support.servers.server_process import save_tiny_model
from tests.vectors.conftest import serving

_ROOT = Path(__file__).resolve().parents[2]
_PAGE = (_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
_MOST_HOPS = 25  # from the application to the engine and back to the socket
# Where a request, or what comes back, passes from one stack of calls to another.
_HAND_OVERS = (
    *("SseResponse.__init__", "SseResponse.__call__", "Inbox.submit"),
    *("OutputRouter.put", "EngineCall._on_event"),
    *("Choice.take", "ChatFormat.chunks", "RequestContext.send_with_headers"),
)


@dataclass
class _Trace:
    """Names of our functions: all that were called, and the stacks at the hand-overs."""

    called: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    stacks: set[tuple[str, ...]] = field(default_factory=set)

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event != "call" or not _is_ours(frame.f_code):
            return
        name = _name(frame.f_code)
        self.called.add(name)
        self.files.add(Path(frame.f_code.co_filename).stem)
        if name in _HAND_OVERS:
            self.stacks.add(tuple(_stack(frame)))


class _Switch:
    """Profiles every thread from the start, and keeps what is called while a trace is on."""

    trace: _Trace | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        trace = self.trace  # read once: an error here would end the thread that is profiled
        if trace is not None:
            trace.profile(frame, event, arg)


def _is_ours(code: CodeType) -> bool:
    path = code.co_filename
    return path.startswith(str(_ROOT)) and "/loraplex_" in path and "comp>" not in code.co_name


def _name(code: CodeType) -> str:
    """``Class.method``; a function inside a method counts as one of its class."""
    owner = code.co_qualname.split(".", 1)[0]
    is_nested = "<locals>" in code.co_qualname and owner[:1].isupper()
    return f"{owner}.{code.co_name}" if is_nested else code.co_qualname.rpartition(">.")[2]


def _stack(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        if _is_ours(frame.f_code):
            yield _name(frame.f_code)
        frame = frame.f_back


async def _traced(folder: Path, switch: _Switch) -> tuple[_Trace, _Trace]:
    base = save_tiny_model(folder / "base")
    body = {
        "adapter": "pirate",
        "stream": True,
        "max_tokens": 4,
        "messages": [{"role": "user", "content": "hi"}],
    }
    async with serving(base, folder / "state") as server:
        adapter = write_lora(folder / "lora", server.app.state.parts.store.base, seed=1)
        switch.trace = registration = _Trace()
        await server.put("pirate", adapter)
        switch.trace = None
        for _ in range(2):  # the first loads the adapter to the device
            switch.trace = chat = _Trace()
            async with AsgiCall(server.app, "POST", "/v1/chat/completions", body=body) as call:
                assert b"[DONE]" in await call.rest()
            switch.trace = None
    return registration, chat


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[_Trace, _Trace]:
    switch = _Switch()
    before = sys.getprofile()
    threading.setprofile(switch)
    sys.setprofile(switch)
    try:
        return asyncio.run(_traced(tmp_path_factory.mktemp("walks"), switch))
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def _section(title: str) -> str:
    return _PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


_OF_SOCKETS = ("LimitedHttp", "ConnectionLimit", "module_groups")  # not in the traced process


def _named(text: str) -> set[str]:
    """Classes, their methods and functions that the numbered steps name."""
    steps = "\n".join(line for line in text.splitlines() if re.match(r"\d+\. |   ", line))
    names = re.findall(r"`(?:[a-z_./]+[./])?([A-Z]\w+(?:\.\w+)?|[a-z]+_\w+|ingest)`", steps)
    return {name for name in names if name not in _OF_SOCKETS}


def _missing(named: set[str], trace: _Trace) -> set[str]:
    classes = {name.partition(".")[0] for name in trace.called}
    return {n for n in named if n not in trace.called | classes | trace.files}


def test_the_walk_of_a_registration_is_the_way_it_takes(traces: tuple[_Trace, _Trace]) -> None:
    named = _named(_section("A registration, hop by hop"))
    assert {"put_adapter", "ingest", "NameChanges.point", "AdapterPacker"} <= named
    assert _missing(named, traces[0]) == set()


def test_the_walk_of_a_chat_is_the_way_it_takes(traces: tuple[_Trace, _Trace]) -> None:
    named = _named(_section("A streamed chat, hop by hop"))
    assert {"RequestContext", "Engine.submit", "DevicePool.ensure_resident", "Choice.take"} <= named
    # a grammar, a template of its own and a base's whole context are asked for by other chats
    elsewhere = {"Templates", "ChatBody", "TokenMasks"}
    assert _missing(named - elsewhere, traces[1]) == set()


def test_the_hops_of_a_chat_are_those_of_the_page(traces: tuple[_Trace, _Trace]) -> None:
    block = re.findall(
        r"^(?:app|call|engine|back) +(.*)$",
        _section("A streamed chat, hop by hop"),
        re.MULTILINE,
    )
    assert len(block) == 4
    told = [hop.strip() for line in block for hop in re.split("[→│]", line)]
    seen = {name for stack in traces[1].stacks for name in stack}
    assert set(told) == seen - {
        "SseResponse.__init__",
        "OutputProcessor._end",
    }  # made; the last token
    on_engine = [hop.strip() for hop in block[2].split("→")]
    assert len(told) - len(on_engine) <= _MOST_HOPS
