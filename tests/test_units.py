import pytest

from hf_memtune.units import GIB, KIB, MIB, TIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (229 * MIB, "229 MiB"),
        (229 * MIB + 400 * KIB, "229 MiB"),
        (100 * MIB, "100 MiB"),
        (GIB - 1, "1 GiB"),  # not "1024 MiB"
        (-3 * MIB, "-3 MiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_format_bytes(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24 GiB", 24 * GIB), ("24GB", 24 * 10**9), ("1.5 kib", 1536), ("512", 512), (" .5 MiB ", MIB // 2), (7, 7)],
)
def test_parse_bytes(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1 GiB", "12 parsecs", "1.2.3 MiB"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="not a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize("n_bytes", [0, 1, 1024, 229 * MIB, 24 * GIB])
def test_round_trip(n_bytes):
    assert parse_bytes(format_bytes(n_bytes)) == n_bytes
