"""The printable letter that a byte-level vocabulary writes for each byte (GPT-2's table).

Printable bytes of Latin-1 stand for themselves; the other 68 take the letters from U+0100 on, in order.
"""

from __future__ import annotations


def _letters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


BYTE_OF_LETTER = {letter: byte for byte, letter in _letters().items()}
BYTE_LETTERS = tuple(BYTE_OF_LETTER)  # in the order of the vocabularies that use them: printable bytes first
