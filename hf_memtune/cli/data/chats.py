"""Conversations as tokens, through the chat template of the tokenizer, with a label on what the assistant says.

Where the template marks it ({% generation %}), transformers tells from where to where. Other templates are rendered turn by turn: what a
turn of the assistant adds to the text before it carries a label, if the whole conversation begins with it letter by letter. The text is tokenised
as a whole, as apply_chat_template does it; its `assistant_masks` are not taken: without a word they leave out, or go on to the end, where a
mark stands at white space that the tokenizer drops.
"""

import json
import re
from os.path import commonprefix
from typing import Any, NamedTuple

from hf_memtune.errors import ConfigError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]
"""From where to where in a text."""

_ROLES = {  # in small letters
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}
_SPOKEN = ("human", "user", "gpt", "chatgpt", "assistant", "system")  # of messages; templates know other roles of their own


class NotText(Exception):
    """A message with an image or something else that a language model cannot read; str() is the reason for which its row is dropped."""


class Chat(NamedTuple):
    """learned_from: number of the first message that may carry a label; one of the weight 0 carries none. tools: as the template takes them,
    or None."""

    messages: list[dict[str, Any]]
    learned_from: int = 0
    tools: list | None = None

    def learns(self, number: int) -> bool:
        """Whether what the assistant says in this message carries a label."""
        message = self.messages[number]
        return message["role"] == "assistant" and number >= self.learned_from and message.get("weight", 1) != 0


def without_nones(value: Any) -> Any:
    """Structs of a data set have every key that any row has; what a row lacks is None there."""
    if isinstance(value, dict):
        return {name: without_nones(each) for name, each in value.items() if each is not None}
    return [without_nones(each) for each in value] if isinstance(value, list) else value


def messages_of(turns: Any, where: str) -> list[dict[str, Any]]:
    """Messages with role and content, of those of transformers or of ShareGPT (from, value). Raises ConfigError, or NotText for messages with
    parts that are no text; where: row and column."""
    if isinstance(turns, str):
        turns = _parsed(turns, where)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConfigError([f"dataset_name: {where} is no list of messages."])
    found = []
    for turn in without_nones(turns):
        if "from" in turn and "role" not in turn:
            weight = {"weight": turn["weight"]} if "weight" in turn else {}
            turn = {"role": turn["from"], "content": turn.get("value", ""), **weight}
            turn["role"] = _ROLES.get(str(turn["role"]).lower(), turn["role"])
        if "role" not in turn:
            raise ConfigError(
                [f"dataset_name: {where} has a message without a role (its keys: {', '.join(turn)}), expected role and content."]
            )
        if (role := str(turn["role"]).lower()) in _SPOKEN:
            turn = turn | {"role": _ROLES[role]}
        if turn.get("weight", 1) not in (0, 1):
            raise ConfigError(
                [
                    f"dataset_name: {where}, message {len(found) + 1} has the weight {turn['weight']!r}, expected 1 (learned) or 0 (not learned). "
                    "Change it, or leave `weight` out: weights in between are not supported."
                ]
            )
        found.append(turn | {"content": _content(turn.get("content", ""))})
    return found


def _content(content: Any) -> Any:
    """The texts of a list of parts together; templates would write such a list as Python does."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise NotText("a message with parts that are no text")
    return "".join(texts)


def tools_of(row: dict, where: str) -> list | None:
    """The column `tools`, if there is one: a list, or JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, where)
    return without_nones(tools) or None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"dataset_name: {where} is text, but no JSON ({error})."]) from error


def chat_tokens(chat: Chat, tokenizer, assistant_only: bool, where: str) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them carry a label. Raises ConfigError where the template cannot tell."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            [
                "dataset_name: the rows are conversations, but the tokenizer has no chat template. Take a model that was tuned for chats, or "
                "name a template: --chat_template_path FILE.jinja, or a model whose template to use."
            ]
        )
    try:
        if not assistant_only:
            ids = tokenizer(_text(chat, tokenizer, len(chat.messages)), add_special_tokens=False)["input_ids"]
            return ids, [True] * len(ids)
        is_marked = bool(_MARKED.search(tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""))
        whole, spans = (_marked if is_marked else _turn_by_turn)(chat, tokenizer, where)
    except ConfigError:
        raise
    except Exception as error:  # templates raise errors of their own: roles that do not alternate, a system role they lack
        raise ConfigError([f"dataset_name: {where}: the chat template refuses the conversation: {error}"]) from error
    if not getattr(tokenizer, "is_fast", False):  # it does not know where in the text a token is
        return _in_pieces(whole, spans, tokenizer)
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], _in_spans(whole, spans, found["offset_mapping"], is_marked)


def _marked(chat: Chat, tokenizer, where: str) -> tuple[str, Spans]:
    """The text, and what the template marks in it, without what carries no label."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"tools": chat.tools, "chat_template": tokenizer.chat_template, "return_assistant_tokens_mask": True}
    (whole,), (spans,) = render_jinja_template([chat.messages], **options, **tokenizer.special_tokens_map)
    for start, stop in _left_out(chat, tokenizer, whole, where):
        spans = [part for span in spans for part in ((span[0], min(span[1], start)), (max(span[0], stop), span[1])) if part[0] < part[1]]
    return whole, spans


def _left_out(chat: Chat, tokenizer, whole: str, where: str) -> Spans:
    """The prompt, whose marks may be of any role, and the messages of the assistant after it that carry no label."""
    unlearned = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant" and not chat.learns(number)]
    spans = []
    if unlearned and unlearned[0] < chat.learned_from:
        spans.append((0, _end_of(chat, tokenizer, chat.learned_from, whole, where)))
    for number in unlearned:
        if number >= chat.learned_from:
            start = _end_of(chat, tokenizer, number, whole, where) if number else 0
            spans.append((start, _end_of(chat, tokenizer, number + 1, whole, where, start)))
    return spans


def _in_spans(whole: str, spans: Spans, offsets: list[tuple[int, int]], in_part: bool) -> list[bool]:
    """Whether each token, from where to where in the text it is, begins within one of the spans, or (in_part, as transformers has it of what is
    marked) goes into one."""
    inside = [False] * (len(whole) + 1)  # one more: a token without text may stand at the end
    for start, stop in spans:
        inside[start:stop] = [True] * (stop - start)
    begins = [_begin(whole, *each) for each in offsets]
    return [any(inside[begin : max(stop if in_part else 0, begin + 1)]) for begin, (_, stop) in zip(begins, offsets)]


def _begin(whole: str, start: int, stop: int) -> int:
    """The first character of a token that is no space, where it has one: the space before a word is the word's, though the prompt ends in it."""
    text = whole[start:stop]
    return start + (len(text) - len(text.lstrip()) if text.strip() else 0)


def _in_pieces(whole: str, spans: Spans, tokenizer) -> tuple[list[int], list[bool]]:
    """The text cut where labels begin and end, each piece tokenised by itself. Some tokenizers put a space before each, that the whole lacks."""
    ids: list[int] = []
    learned: list[bool] = []
    at = 0
    for start, stop in [*spans, (len(whole), len(whole))]:
        for piece, is_learned in ((whole[at:start], False), (whole[start:stop], True)):
            tokens = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids += tokens
            learned += [is_learned] * len(tokens)
        at = stop
    return ids, learned


def _turn_by_turn(chat: Chat, tokenizer, where: str) -> tuple[str, Spans]:
    """The text, and what each turn of the assistant that is learned adds to it."""
    whole, spans = _text(chat, tokenizer, len(chat.messages)), []
    for number in range(len(chat.messages)):
        if not chat.learns(number):
            continue
        until = _text(chat, tokenizer, number + 1)
        # some templates open the answer differently when it is known: what both share is the prompt
        prompt = _text(chat, tokenizer, number, add_generation_prompt=True) if number else _opening(chat, tokenizer, until)
        start = len(commonprefix([prompt, until]))
        spans.append((start, _end_of(chat, tokenizer, number + 1, whole, where, start)))
    return whole, spans


def _opening(chat: Chat, tokenizer, first: str) -> str:
    """What stands before the answer in the text of a chat that begins with one: no template writes the prompt of no messages, but what it opens
    the next answer with opens the first one too."""
    header = _text(chat, tokenizer, 1, add_generation_prompt=True).removeprefix(first)
    at = first.find(header)
    return first[: at + len(header)] if at >= 0 else ""


def _end_of(chat: Chat, tokenizer, count: int, whole: str, where: str, start: int = 0) -> int:
    """Where the first `count` messages end in the text of all. Raises ConfigError where it does not begin with theirs, or they before start."""
    until = _text(chat, tokenizer, count)
    stop = len(commonprefix([until, whole]))
    ending = until[stop:].replace(tokenizer.eos_token or "", "").strip()  # some templates end the last message alone
    if ending or start > stop:
        raise ConfigError(
            [
                f"assistant_only_loss: {where}: the chat template writes message {count} in another way when more messages follow, so the "
                "tokens of the assistant cannot be told apart. Use a template that writes it the same (--chat_template_path; where every answer is "
                "learned, one with {% generation %} marks will do), or --assistant_only_loss false."
            ]
        )
    return stop


def _text(chat: Chat, tokenizer, count: int, **options: Any) -> str:
    return tokenizer.apply_chat_template(chat.messages[:count], tools=chat.tools, tokenize=False, **options) if count else ""
