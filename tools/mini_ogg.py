"""Give an Ogg file a chosen stream serial number.

libsndfile draws the serial number from the clock; with a fixed one the same samples give the same bytes. Page layout
and checksum: RFC 3533.
"""

from __future__ import annotations

from pathlib import Path

POLYNOMIAL = 0x04C11DB7


def _checksum_table() -> list[int]:
    table = []
    for byte in range(256):
        register = byte << 24
        for _ in range(8):
            register = ((register << 1) ^ POLYNOMIAL if register & 0x80000000 else register << 1) & 0xFFFFFFFF
        table.append(register)
    return table


TABLE = _checksum_table()


def checksum(page: bytes) -> int:
    """The CRC-32 of a page whose checksum field is zero (no reflection, start and final XOR 0)."""
    register = 0
    for byte in page:
        register = ((register << 8) & 0xFFFFFFFF) ^ TABLE[(register >> 24) ^ byte]
    return register


def set_serial(path: Path, serial: int) -> None:
    """Rewrite every page of the file with the serial number and its new checksum.

    Args:
        path: an Ogg file of one stream.
        serial: 32 bits.

    Raises:
        ValueError: the file is not made of whole Ogg pages.
    """
    data = bytearray(path.read_bytes())
    position = 0
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            raise ValueError(f"{path}: no Ogg page at byte {position}")
        segments = data[position + 26]
        end = position + 27 + segments + sum(data[position + 27 : position + 27 + segments])
        data[position + 14 : position + 18] = serial.to_bytes(4, "little")
        data[position + 22 : position + 26] = bytes(4)
        data[position + 22 : position + 26] = checksum(bytes(data[position:end])).to_bytes(4, "little")
        position = end
    path.write_bytes(data)
