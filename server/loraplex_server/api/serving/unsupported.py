"""Refuses fields that this server does not support and that would change the answer."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

from loraplex_server.api.protocol.body import Body
from loraplex_server.api.protocol.chat import ChatBody
from loraplex_server.errors import invalid


def _unless(*accepted: object) -> Callable[[object], bool]:
    """Return a rule that is True for every value but these."""
    return lambda value: value not in accepted


is_set = _unless(None, [], {}, False, "")
_is_present = _unless(None)

# field → (does the value request something unsupported?, the reason or the remedy)
Rules = Mapping[str, tuple[Callable[[object], bool], str]]

_REFUSED: Rules = {
    "functions": (is_set, "the older form of tool calls is not supported; use tools"),
    "function_call": (
        _unless(None, "none", "auto"),
        "the older form is not supported; use tool_choice",
    ),
    "modalities": (_unless(None, ["text"]), "only text is supported"),
    "audio": (is_set, "only text is supported"),
    "prompt_embeds": (is_set, "tensors are not accepted over HTTP"),
    "use_beam_search": (is_set, "beam search is not supported"),
    "chat_template": (is_set, "templates come from the model or the adapter, never from a request"),
    "normalize": (_is_present, "it is called use_activation"),
    "padding": (_unless(None, "do_not_pad"), "prompts are never padded"),
    "suffix": (is_set, "insertion is not supported"),
    **dict.fromkeys(
        ("max_new_tokens", "n_predict", "num_predict"), (_is_present, "it is called max_tokens")
    ),
    "repeat_penalty": (_unless(None, 1), "it is called repetition_penalty"),
    "do_sample": (_unless(None, True), "send temperature: 0 for a greedy answer"),
    "logits_processors": (is_set, "code of a request is never run"),
    "typical_p": (_unless(None, 1), "use top_p or min_p"),
    "mirostat": (_unless(None, 0), "use top_p or min_p"),
    "web_search_options": (_is_present, "this server calls no other servers"),
    "moderation": (is_set, "this server moderates nothing"),
    "format": (is_set, "use response_format"),  # of Ollama
    "structural_tag": (is_set, "use tools, or guided_grammar"),
    "guided_whitespace_pattern": (is_set, "set x-guidance in the schema"),
    "extra_body": (is_set, "OpenAI's client sends its fields beside the others"),
}
# Other names of the adapter, which the base would answer if they were ignored: `adaptor`, `loras`,
# `lora_request` … LoRAX's `adapter_source` chooses nothing.
_NAMES_ADAPTER = re.compile(r"(?i)(?!adapter_source$)(.*[_-])?(lora|peft|adapt[eo]r)")
_MAX_NAME = 64
# Fields that chats and completions refuse. If one of these routes supports a field, its body
# declares it, and it is not looked up here.
OF_TEXT: Rules = {
    **_REFUSED,
    "best_of": (_unless(None, 1), "only /v1/completions chooses the best of several; use n"),
    "thinking_token_budget": (_is_present, "reasoning has no budget of its own; use max_tokens"),
    "return_tokens_as_token_ids": (is_set, "use return_token_ids"),
    "truncate_prompt_tokens": (_is_present, "prompts are not truncated; shorten the prompt"),
    "echo": (is_set, "only /v1/completions repeats a prompt"),
    "add_special_tokens": (is_set, "a chat has the special tokens of its template"),
}


def refuse_unsupported(
    fields: Mapping[str, object], rules: Rules = _REFUSED, *, adapter_field: str = "adapter"
) -> None:
    """Raises ApiError (400, code ``unsupported_parameter``) for the first unsupported field.

    ``fields``: the unknown fields of the body. ``adapter_field`` names the adapter in this body.
    """
    for name, value in fields.items():
        rule = rules.get(name)
        if rule is not None and rule[0](value):
            raise invalid(f"{name!r}: {rule[1]}", name, "unsupported_parameter")
        if len(name) <= _MAX_NAME and _NAMES_ADAPTER.match(name) and is_set(value):
            raise invalid(
                f"{name!r} is no field of this server; name the adapter in {adapter_field!r}",
                name,
                "unsupported_parameter",
            )


def refuse_parts(part: Body, param: str, without_effect: Collection[str] = ()) -> None:
    """Refuse unknown fields of a part of the body that says how an answer is constrained.

    Raises ApiError (400, code ``unsupported_parameter``).
    """
    for name, value in (part.model_extra or {}).items():
        if is_set(value) and name not in without_effect:
            raise invalid(
                f"{param}.{name} is no field of this server and would not be enforced",
                f"{param}.{name}",
                "unsupported_parameter",
            )


def of_chat(own: Iterable[str]) -> Rules:
    """Refuse the fields of chats that are not among the ``own`` fields of another API."""
    reason = "it is a field of /v1/chat/completions and has no meaning here"
    return dict.fromkeys({*OF_TEXT, *ChatBody.model_fields} - {*own}, (is_set, reason))
