#!/usr/bin/env python3
"""smaller_png.py IN OUT: the same picture with a palette of at most 256 colours, as small as zlib makes it. For what browsers paint: 8 bits, RGB or
RGBA, not interlaced; each colour becomes the nearest of the most frequent ones."""
import struct
import sys
import zlib
from collections import Counter


def chunks(data):
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        yield kind, data[at + 8:at + 8 + length]
        at += 12 + length


def rows(raw, width, height, size):
    """The lines without their filters (PNG specification, chapter 9)."""
    stride, before = width * size, bytearray(width * size)
    for y in range(height):
        start = y * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1:start + 1 + stride])
        if kind == 1:
            for i in range(size, stride):
                line[i] = (line[i] + line[i - size]) & 255
        elif kind == 2:
            line = bytearray((a + b) & 255 for a, b in zip(line, before))
        elif kind == 3:
            for i in range(stride):
                left = line[i - size] if i >= size else 0
                line[i] = (line[i] + (left + before[i]) // 2) & 255
        elif kind == 4:
            for i in range(stride):
                a = line[i - size] if i >= size else 0
                b, c = before[i], before[i - size] if i >= size else 0
                p = a + b - c
                pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
                line[i] = (line[i] + (a if pa <= pb and pa <= pc else b if pb <= pc else c)) & 255
        yield bytes(line)
        before = line


def main(source, target):
    data = open(source, "rb").read()
    header = next(body for kind, body in chunks(data) if kind == b"IHDR")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    assert depth == 8 and colour in (2, 6) and not interlaced, "not what browsers paint"
    size = 3 if colour == 2 else 4
    raw = zlib.decompress(b"".join(body for kind, body in chunks(data) if kind == b"IDAT"))
    pixels = [[line[i:i + 3] for i in range(0, len(line), size)] for line in rows(raw, width, height, size)]
    counted = Counter(pixel for line in pixels for pixel in line)
    palette = [pixel for pixel, _ in counted.most_common(256)]
    place = {pixel: at for at, pixel in enumerate(palette)}
    for pixel in counted:
        if pixel not in place:
            place[pixel] = min(range(len(palette)), key=lambda at: sum((a - b) ** 2 for a, b in zip(palette[at], pixel)))
    body = b"".join(b"\0" + bytes(place[pixel] for pixel in line) for line in pixels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    with open(target, "wb") as out:
        out.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
                  + chunk(b"PLTE", b"".join(palette)) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b""))


main(*sys.argv[1:3])
