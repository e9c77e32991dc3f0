"""Documents: texts, conversations and token numbers, and the tokens of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grokquant.errors import InputError
from grokquant.families.tokenizer import tokens_of
from grokquant.memory import refused

# The fields that hold a document, the first of them that a record has.
_FIELDS = ("text", "messages", "conversations", "input_ids", "content")
_TOOLS = "tools"  # beside the messages: the functions that an assistant may call
# The two ways in which published conversations name who speaks and what is said.
_SPEAKER = {"from": "role", "value": "content"}
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Chat:
    """A conversation, which the chat template of a model makes a text."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] = ()

    def __len__(self) -> int:
        """About the number of its characters."""
        return len(str(self.messages)) + len(str(self.tools))


@dataclass(frozen=True)
class TokenIds:
    """A document that is tokenized already."""

    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


Document = str | Chat | TokenIds


def columns_of(names: Sequence[str], field: str | None, where: str) -> list[str]:
    """The fields that make a document: first the one that holds it, then what belongs to it.

    Raises InputError if there is none.
    """
    wanted = _FIELDS if field is None else (field,)
    found = next((name for name in wanted if name in names), None)
    if found is None:
        text = f"{where}: no field {', '.join(wanted)}, only {', '.join(names)[:200]}"
        raise InputError(text if field else f"{text}; name it by the key field")
    tools = [_TOOLS] if found != _TOOLS and _TOOLS in names else []
    return [found, *tools]


def document_of(record: object, field: str | None, where: str) -> Document:
    """The document that a record holds: itself if it is a string, else one of its fields.

    null is an empty document. Raises InputError that begins with `where`.
    """
    if isinstance(record, str):
        return _text(record, where)
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: expected a JSON object or a string")
    name, *tools = columns_of([str(name) for name in record], field, where)
    match record[name]:
        case None:
            return ""
        case str(text):
            return _text(text, f'{where}: "{name}"')
        case [] | [int(), *_] as ids if all(type(number) is int for number in ids):
            return TokenIds(tuple(ids))
        case [dict(), *_] as messages if all(isinstance(each, dict) for each in messages):
            offered = record[tools[0]] if tools else None
            return _chat(messages, offered, f'{where}: "{name}"')
    kind = type(record[name]).__name__
    raise InputError(
        f'{where}: "{name}" should be a text, a conversation or token numbers, not {kind}'
    )


def tokens_of_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> Sequence[int]:
    """The tokens of a document, those of a conversation by the tokenizer's chat template.

    Raises InputError where there is no template, it fails, or a number is no token.
    """
    match document:
        case str():
            return tokens_of(tokenizer, document)
        case TokenIds(ids):
            if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
                raise InputError(f"token numbers should be from 0 to {len(tokenizer) - 1}")
            return ids
        case Chat(messages, tools):
            return tokens_of(tokenizer, _rendered(tokenizer, messages, tools))


def bytes_of(document: Document) -> bytes:
    """A document as bytes, for checksums."""
    match document:
        case str():
            return document.encode()
        case TokenIds(ids):
            return json.dumps(ids).encode()
        case Chat(messages, tools):
            return json.dumps([messages, tools], sort_keys=True).encode()


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: tuple, tools: tuple) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("holds conversations, but the model has no chat template")
    with refused("the model's chat template fails"):  # a program, run in a sandbox
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False
        )
    return str(text)


def _chat(messages: list, tools: object, where: str) -> Chat:
    """Conversations of either kind as those that templates take."""
    renamed = [
        {_SPEAKER.get(key, key): value for key, value in message.items()} for message in messages
    ]
    for message in renamed:
        role = message.get("role")
        if not isinstance(role, str):
            raise InputError(f"{where}: a message without role")
        message["role"] = _ROLES.get(role, role)
    _text(json.dumps(renamed, ensure_ascii=False), where)
    return Chat(tuple(renamed), tuple(tools) if isinstance(tools, list) else ())


def _text(text: str, where: str) -> str:
    """Returns `text` if a tokenizer accepts it: JSON may hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half of a surrogate pair") from None
    return text
