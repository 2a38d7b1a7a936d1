"""What kind of text a token is, by its characters alone: enough to see what a score favours, where words have spaces between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

CLASSES = {
    "word start": "begins a word",
    "word continuation": "goes on with a word, or is a part of a character",
    "number": "digits",
    "punctuation": "signs and symbols, without a letter or a digit",
    "white space": "spaces and line breaks alone",
    "special": "a sign of the tokenizer or of the chat template, such as the end of a turn",
}
_PART_OF_CHARACTER = "�"


def token_classes(pieces: Sequence[str], ids: Sequence[int], special: Collection[int]) -> list[str]:
    """The class of each of n tokens, a key of CLASSES. pieces: the text each adds, so that joined they give the text; special: ids of
    tokens that are no text."""
    found, before = [], ""
    for piece, number in zip(pieces, ids, strict=True):
        is_special = number in special
        found.append("special" if is_special else _class(piece, before))
        before = "" if is_special else (piece or before)
    return found


def _class(piece: str, before: str) -> str:
    """before: the text of the token before it, empty at the start and after a special one."""
    body = piece.strip()
    if not body:
        return "white space" if piece else "word continuation"
    if _PART_OF_CHARACTER in body:
        return "word continuation"
    if not any(character.isalnum() for character in body):
        return "punctuation"
    if not any(character.isalpha() for character in body):
        return "number"
    follows_word = before[-1:].isalpha() and not piece[0].isspace()
    return "word continuation" if follows_word else "word start"
