"""The digest by which router and worker agree on a tokenizer."""

from rhizome.tokenizer import tokenizer_sha256


def test_the_digest_tells_names_and_contents_apart() -> None:
    """Moving a byte from a name to its data, or from one file to the next, changes it; the order does not."""
    some = {"a": b"bc", "d": b"e"}
    assert tokenizer_sha256(some) == tokenizer_sha256(dict(reversed(some.items())))
    others = [{"ab": b"c", "d": b"e"}, {"a": b"bcd", "": b"e"}, {"a": b"b", "d": b"ce"}, {"a": b"bc"}]
    assert len({tokenizer_sha256(files) for files in [some, *others]}) == 5
