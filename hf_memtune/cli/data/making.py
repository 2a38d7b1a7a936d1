"""One row of each kind as tokens and labels; or the reason why nothing can be learned from it."""

import json
from collections.abc import Collection
from typing import Any

from hf_memtune.cli.arguments import DataSource
from hf_memtune.cli.data.chats import Chat, NotText, chat_tokens, messages_of, tools_of, without_nones
from hf_memtune.cli.data.kinds import CHAT, COMPLETION, INSTRUCTION, SHAREGPT, TEXT, text_column
from hf_memtune.cli.data.mixed import written
from hf_memtune.errors import ConfigError

IGNORED = -100
PLAIN_PROMPT = "### Instruction:\n{request}\n\n### Response:\n"  # for tokenizers without a chat template
EMPTY, CUT, NO_ANSWER = "empty", "nothing to learn within max_length", "no answer of an assistant"


class BadRow(ConfigError):
    """A row that is not what its columns promise."""


def as_text(value: Any) -> str:
    """Text as it is, nothing as nothing, and what has structure as JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(without_nones(value), ensure_ascii=False)
    except TypeError as error:  # dates, decimals, bytes: nobody said how they are written
        wrong = f"a text is a {type(value).__name__}, or has what JSON cannot write ({error})"
        raise ConfigError([f"dataset_name: {wrong}. Store it as text, the way it is to be learned."]) from error


def dropped_row(reason: str) -> dict:
    """In place of a row that is left out."""
    return {"input_ids": [], "attention_mask": [], "labels": [], "dropped": reason}


def language_row(row: dict, number: int, kind: str, data: DataSource, tokenizer, mixed: Collection[str] = (), of: str = "rows") -> dict:
    """A row of a language model, with the reason, if any, for which it is to be dropped. mixed: columns of `as_stored`. of: what rows.

    Raises BadRow for one that was meant to be learned from, and cannot be read.
    """
    try:
        made = _MAKERS[kind](written(row, mixed), data, tokenizer, f"row {number} of the {of}")
    except NotText as reason:
        return dropped_row(str(reason))
    except ConfigError as error:
        if tokenizer.chat_template is None:  # of which every row would say the same
            raise
        raise BadRow(error.problems) from error
    if "dropped" in made:
        return made
    has_label = any(label != IGNORED for label in made["labels"][1:])  # nothing predicts the first token
    return made | {"dropped": ""} if has_label else dropped_row(CUT)


def text_row(row: dict, data: DataSource, tokenizer, where: str = "") -> dict:
    """Plain text: every token carries a label, the end of the text too."""
    text = as_text(row[text_column(data)])
    if not text.strip():
        return dropped_row(EMPTY)
    ids = _ended(tokenizer(text)["input_ids"], tokenizer)
    return _cut(ids, [True] * len(ids), data.max_length)


def instruction_row(row: dict, data: DataSource, tokenizer, where: str = "") -> dict:
    """A request and its answer; the request is masked out of the loss."""
    parts = [row.get(name) for name in (data.instruction_column, data.input_column)]
    request = "\n\n".join(as_text(part) for part in parts if part not in (None, "", [], {}))  # 0 is something
    answer = as_text(row[data.output_column])
    if not answer.strip() or not request.strip():
        return dropped_row(EMPTY)
    if tokenizer.chat_template is None:
        return _prompted(PLAIN_PROMPT.format(request=request), answer, data, tokenizer)
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return _chat(Chat(messages), data, tokenizer, where)


def completion_row(row: dict, data: DataSource, tokenizer, where: str = "") -> dict:
    """A prompt and its completion, as texts or as messages; the prompt is masked out of the loss."""
    prompt, completion = row["prompt"], row["completion"]
    if _are_turns(prompt) or _are_turns(completion):
        prompt, completion = _turns(prompt, "user"), _turns(completion, "assistant")
        before = messages_of(prompt, f"{where}, prompt")
        chat = Chat([*before, *messages_of(completion, f"{where}, completion")], len(before), tools_of(row, f"{where}, tools"))
        return _chat(chat, data, tokenizer, where) if completion else dropped_row(EMPTY)
    text = as_text(completion)
    return _prompted(as_text(prompt), text, data, tokenizer) if text.strip() else dropped_row(EMPTY)


def _are_turns(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(turn, dict) for turn in given)


def _turns(given: Any, role: str) -> list:
    """Messages as they are; a text as what one role says."""
    return given if isinstance(given, list) else [{"role": role, "content": text}] if (text := as_text(given)) else []


def conversation_row(column: str, row: dict, data: DataSource, tokenizer, where: str = "") -> dict:
    """A conversation of any number of turns."""
    if not row[column]:
        return dropped_row(EMPTY)
    messages = messages_of(row[column], f"{where}, {column}")
    if not any(message["role"] == "assistant" and (message["content"] or message.get("tool_calls")) for message in messages):
        return dropped_row(NO_ANSWER) if data.assistant_only_loss else dropped_row(EMPTY)
    return _chat(Chat(messages, tools=tools_of(row, f"{where}, tools")), data, tokenizer, where)


_MAKERS = {
    TEXT: text_row,
    INSTRUCTION: instruction_row,
    COMPLETION: completion_row,
    CHAT: lambda *args: conversation_row("messages", *args),
    SHAREGPT: lambda *args: conversation_row("conversations", *args),
}


def classified_row(row: dict, data: DataSource, tokenizer, classes: dict, mixed: Collection[str] = ()) -> dict:
    """A text and the number of its class."""
    text = as_text(written(row, mixed)[text_column(data)])
    if not text.strip():
        return {**tokenizer(""), "labels": 0, "dropped": EMPTY}
    tokens = tokenizer(text, truncation=True, max_length=data.max_length)
    return {**tokens, "labels": classes[row[data.label_column]], "dropped": ""}


def _chat(chat: Chat, data: DataSource, tokenizer, where: str) -> dict:
    ids, learned = chat_tokens(chat, tokenizer, data.assistant_only_loss, where)
    return _cut(ids, learned, data.max_length) if any(learned) else dropped_row(NO_ANSWER)


def _prompted(prompt: str, answer: str, data: DataSource, tokenizer) -> dict:
    before, ending = opened(prompt, tokenizer)
    rest = _ended(tokenizer(answer, add_special_tokens=False)["input_ids"] + ending, tokenizer)
    return _cut(before + rest, [not data.assistant_only_loss] * len(before) + [True] * len(rest), data.max_length)


def _ended(ids: list[int], tokenizer) -> list[int]:
    """With the end token, of a tokenizer that has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def opened(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of a text that goes on, and those with which the tokenizer would have ended it."""
    ids, ending = tokenizer(text)["input_ids"], ending_of(tokenizer)
    return ids[: len(ids) - len(ending)], ending


def ending_of(tokenizer) -> list[int]:
    """What the tokenizer puts after every text: the end token, [SEP], or nothing. Seen by a text that has none of it."""
    text, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole) - len(text) + 1) if whole[at : at + len(text)] == text]
    return whole[starts[-1] + len(text) :] if starts else []


def _cut(ids: list[int], learned: list[bool], max_length: int) -> dict:
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned)][:max_length]
    return {"input_ids": ids[:max_length], "attention_mask": [1] * len(labels), "labels": labels}
