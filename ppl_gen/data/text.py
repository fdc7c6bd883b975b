"""Text as sequences of symbols: Alice's Adventures in Wonderland, and any text of one's own.

A symbol's code is its place in an alphabet. A text is cut into sequences which, joined, are the text again: each
character stands in exactly one of them, so bits per character over all sequences are bits per character of the text.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_gen.arguments import require_choice, require_text
from ppl_gen.data.arrays import as_array
from ppl_gen.data.rows import Rows
from ppl_gen.errors import require_whole

__all__ = ["ALPHABET", "alice_text", "decoded", "encoded", "text_rows"]

#: The 70 characters of ``load_data("alice")`` in ASCII order: the code of a character is its place here.
ALPHABET = "\n !\"'()*,-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_`abcdefghijklmnopqrstuvwxyz"

_PADDING = 0  # a code of the alphabet, as models of categories ask for; `lengths` says where it begins
_TRAINING = 0.9


def alice_text(split: Literal["train", "test"] | None = None) -> str:
    """Alice's Adventures in Wonderland (Carroll, 1865): 148425 characters, in the public domain.

    It is the file alice29.txt of the Canterbury corpus (Arnold and Bell, 1997) without the line that names the
    electronic edition, with plain line breaks. "train" ends with the first paragraph that ends in the last tenth of the
    characters; "test" is the rest; None is both.

    Raises:
        ValueError: for another split.

    Example:
        >>> alice_text("train").split()[:4], alice_text("test").split()[-2:]
        (["ALICE'S", 'ADVENTURES', 'IN', 'WONDERLAND'], ['THE', 'END'])
    """
    require_choice("split", split, ("train", "test"), optional=True)
    text = files("ppl_gen.data").joinpath("alice.txt").read_text("ascii").replace("\r\n", "\n")
    cut = text.index("\n\n", int(_TRAINING * len(text))) + 2
    return {"train": text[:cut], "test": text[cut:], None: text}[split]


def encoded(text: str, alphabet: str = ALPHABET) -> Tensor:
    """The code of each character: (characters,) in int64.

    Raises:
        ValueError: for a character that the alphabet does not hold, or an alphabet that repeats one.

    Example:
        >>> encoded("cab", "abc")
        tensor([2, 0, 1])
    """
    require_text("text", text)
    _check_alphabet(alphabet)
    places = {symbol: code for code, symbol in enumerate(alphabet)}
    unknown = sorted(set(text) - set(places))
    if unknown:
        raise ValueError(
            f"text: the characters {''.join(unknown)!r} are not in the alphabet; "
            "leave them out, or pass alphabet=''.join(sorted(set(text)))"
        )
    return torch.tensor([places[symbol] for symbol in text], dtype=torch.int64)


def _check_alphabet(alphabet: Any) -> None:
    require_text("alphabet", alphabet, "its characters as text")
    if len(set(alphabet)) != len(alphabet) or not alphabet:
        raise ValueError(f"alphabet: expected different characters, at least one, got {alphabet!r}")


def decoded(codes: Tensor, lengths: Tensor | None = None, alphabet: str = ALPHABET) -> list[str]:
    """The text of each row of codes (rows, time), up to its length where ``lengths`` are given.

    Raises:
        ValueError: for codes of another shape or outside the alphabet.

    Example:
        >>> decoded(torch.tensor([[2, 0, 1], [0, 0, 0]]), torch.tensor([3, 2]), "abc")
        ['cab', 'aa']
    """
    _check_alphabet(alphabet)
    codes = _whole("codes", codes, 2)
    lengths = None if lengths is None else _whole("lengths", lengths, 1)
    if lengths is not None and (len(lengths) != len(codes) or not bool((lengths >= 0).all())):
        raise ValueError(f"lengths: expected one for each of the {len(codes)} rows, none negative, got {lengths}")
    ends = [codes.shape[1]] * len(codes) if lengths is None else lengths.tolist()
    rows = [row[:end] for row, end in zip(codes.tolist(), ends, strict=True)]
    wrong = sorted({code for row in rows for code in row if not 0 <= code < len(alphabet)})
    if wrong:
        raise ValueError(f"codes: expected 0 to {len(alphabet) - 1}, places in the alphabet, got {wrong[:5]}")
    return ["".join(alphabet[code] for code in row) for row in rows]


def _whole(name: str, value: Any, dims: int) -> Tensor:
    tensor = torch.as_tensor(as_array(value, name))
    if tensor.dim() != dims or tensor.is_floating_point() or tensor.dtype is torch.bool:
        shape = "one for each row" if dims == 1 else "rows x time"
        raise ValueError(f"{name}: expected whole numbers, {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor


def text_rows(text: str, *, length: int = 128, alphabet: str = ALPHABET) -> Rows:
    """Cut a text into sequences of at most ``length`` characters, each after a space or line break where it has one.

    ``x`` (rows, length) holds codes in int64, filled up with the code 0; ``lengths`` (rows,) says how many of them are
    text. The rows joined are the text: nothing is dropped, doubled or added, and no symbol marks an end.

    Args:
        text: at least one character.
        length: the most characters in a sequence.
        alphabet: the symbols in the order of their codes.

    Raises:
        ValueError: for an empty text, a length below 1, or a character outside the alphabet.

    Example:
        >>> rows = text_rows("down the rabbit-hole", length=9)
        >>> decoded(rows["x"], rows["lengths"])
        ['down the ', 'rabbit-ho', 'le']
    """
    require_whole("length", length)
    length = int(length)  # one of numpy's small integers would wrap round, and the cutting never end
    require_text("text", text)
    if not text:
        raise ValueError("text: expected at least one character, got an empty text")
    codes, starts = encoded(text, alphabet), [0]
    while (start := starts[-1]) + length < len(text):
        window = text[start : start + length]
        blank = max(window.rfind(" "), window.rfind("\n"))
        starts.append(start + (blank + 1 if blank >= 0 else length))
    lengths = torch.tensor([*starts[1:], len(text)]) - torch.tensor(starts)
    x = torch.full((len(starts), length), _PADDING, dtype=torch.int64)
    for row, start, size in zip(x, starts, lengths.tolist(), strict=True):
        row[:size] = codes[start : start + size]
    return Rows({"x": x, "lengths": lengths})
