"""Tokens of texts and the bytes that each stands for, by every kind of tokenizer."""

import inspect
import json
import textwrap
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dynamic_transformers.data import encoding
from dynamic_transformers.data.encoding import Encoder, byte_lengths, cut_long_text, keeps_words_apart
from dynamic_transformers.data.tokenization import exact_tokenizer, train_tokenizer

HARD = [
    "",
    " ",
    "a\n",
    "aé東🙂b",
    "caf\u00e9 cafe\u0301 \u212b \u2126 ﬁ",
    unicodedata.normalize("NFD", "Nguyễn học tiếng Việt; đường phố 1.234"),
    "\u0958 \u1e9b\u0323",  # which NFC makes longer
    "I'LL don't 12345 x_1 == 3.14e-7\t\r\n\n  indented",
    "\x00\x7f\ufeff\ufffd\u200b\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "  two  spaces   at ends  ",
]
unicode_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spoken = st.text(st.sampled_from("aé東🙂e\u0301\u212b .,\n'sl1"), max_size=60)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(texts, pattern, normalizer=None, add_prefix_space=False):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, **options))
    return backend


def metaspace(texts):
    """As sentencepiece's: a space is ▁, an unknown character becomes its bytes."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    return backend


def wordpiece(texts):
    """As BERT's: lower case, no accents, no spaces, an unknown word is one token."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "<s>", "</s>"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return backend


MAKERS = {
    "gpt2": lambda texts: byte_level(texts, GPT2),
    "prefix space": lambda texts: byte_level(texts, GPT2, add_prefix_space=True),
    "gpt4": lambda texts: byte_level(texts, GPT4),
    "gpt4o": lambda texts: byte_level(texts, GPT4O),
    "nfc": lambda texts: byte_level(texts, GPT4, normalizers.NFC()),
    "nfkc, lower case": lambda texts: byte_level(
        texts, GPT2, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "over words": lambda texts: byte_level(texts, r"[\s\S]{1,40}"),  # as SuperBPE
    "strip": lambda texts: byte_level(texts, GPT2, normalizers.Strip()),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


@pytest.fixture(scope="module")
def encoders(make_texts):
    """By name, each with what `tokenizers` makes of a text by itself: ids and offsets."""
    texts = [*make_texts(100), *HARD]
    made = {name: exact_tokenizer(make(texts)).backend_tokenizer for name, make in MAKERS.items()}
    made["own"] = train_tokenizer(texts, 500).backend_tokenizer
    return {name: Encoder(backend, 1, 2) for name, backend in made.items()}


def check(encoder, text, encoded):
    """The tokens are those of the text as a whole, the bytes those of the characters."""
    plain = encoder.backend.encode(text, add_special_tokens=False)
    assert encoded.input_ids.tolist() == [1, *plain.ids, 2]
    assert (encoded.input_ids.dtype, encoded.num_bytes.dtype) == (np.int32, np.uint32)
    assert encoded.num_bytes[0] == encoded.num_bytes[-1] == 0 and encoded.targets is None
    assert encoded.num_bytes.sum() == (len(text.encode()) if plain.ids else 0)
    normalizer = encoder.backend.normalizer
    read = normalizer.normalize_str(text) if normalizer else text
    # A text that is another, but of as many bytes, is taken for unchanged; its sum is right.
    if len(plain.ids) > 1 and (read == text or len(read.encode()) != len(text.encode())):
        # Where a token ends and the next begins behind it, all bytes up to there are counted.
        starts, ends = np.array(plain.offsets).T
        furthest = np.maximum.accumulate(ends)[:-1]
        between = (ends[:-1] == furthest) & (starts[1:] >= furthest)
        sizes = np.cumsum([0, *(len(character.encode()) for character in text)])
        counted = np.cumsum(encoded.num_bytes[1:-2])
        assert (counted[between] == sizes[furthest[between]]).all()


@given(texts=st.lists(unicode_texts | spoken, max_size=4))
@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize("name", [*MAKERS, "own"])
def test_bytes_are_those_of_the_offsets(encoders, name, texts):
    encoder, texts = encoders[name], [*texts, *HARD]
    for text, encoded in zip(texts, encoder(texts), strict=True):
        check(encoder, text, encoded)


def test_kinds_of_tokenizers_are_told_apart(encoders):
    assert {name for name, encoder in encoders.items() if encoder.byte_lengths is None} == {
        "metaspace",
        "wordpiece",
    }


def test_the_table_is_the_bytes_of_each_token(encoders):
    encoder = encoders["own"]
    assert encoder.byte_lengths.tolist() == [
        len(encoder.backend.id_to_token(number).encode())
        if number == 0
        else len(encoder.backend.id_to_token(number))
        for number in range(encoder.vocab_size)
    ]
    assert encoder.byte_lengths[0] == len("<|endoftext|>")
    backend = Tokenizer.from_str(encoder.backend.to_str())
    backend.add_tokens(["é東"])
    assert byte_lengths(backend)[-1] == 5 and len(byte_lengths(backend)) == encoder.vocab_size + 1


def test_bytes_by_hand():
    backend = Tokenizer.from_str(train_tokenizer(["a"], 257).backend_tokenizer.to_str())  # bytes alone
    (encoded,) = Encoder(backend, 0, 0)(["aé東🙂b"])
    assert encoded.num_bytes.tolist() == [0, *[1] * 11, 0]
    backend.normalizer = normalizers.NFC()
    composed, long, same = Encoder(backend, 0, 0)(["ae\u0301b", "a\u212bb", "aéb"])
    # Both bytes of é have the place of e, by which the first counts; the accent counts for what comes next.
    assert composed.num_bytes.tolist() == [0, 1, 1, 0, 3, 0]
    assert long.num_bytes.tolist() == [0, 1, 3, 0, 1, 0]
    assert same.num_bytes.tolist() == [0, 1, 1, 1, 1, 0]


def test_offsets_that_step_back_count_no_byte_twice():
    offsets = [(0, 1), (1, 3), (1, 2), (3, 5)]
    assert encoding._bytes_by_offsets("abécd", offsets).tolist() == [1, 3, 0, 2]


def test_unknown_characters_become_bytes_of_one_character(encoders):
    (encoded,) = encoders["metaspace"](["a☃"])
    assert encoded.num_bytes.tolist()[-4:] == [3, 0, 0, 0] and encoded.num_bytes.sum() == 4


@pytest.fixture(scope="module")
def long_texts(make_texts):
    """Code and prose of Python, and words in several scripts."""
    code = [inspect.getsource(module) for module in (json.decoder, textwrap)]
    prose = "\n\n".join(filter(None, (inspect.getdoc(thing) for thing in vars(np).values())))
    return [
        *code,
        prose[:20_000],
        "\n".join(make_texts(60, 3)),
        "x" * 5000,
        " " * 5000,
        "a1 " * 2000 + "東" * 900,
    ]


@pytest.mark.parametrize("size", [5, 100, 1000])
@pytest.mark.parametrize(
    "name", ["own", "gpt2", "prefix space", "gpt4", "gpt4o", "nfc", "metaspace", "over words"]
)
def test_parts_of_a_long_text_give_its_tokens(encoders, long_texts, monkeypatch, name, size):
    monkeypatch.setattr(encoding, "PART_CHARACTERS", size)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 2 * size)
    cuttable = [text for text in long_texts if cut_long_text(text) and " " in text and text.strip()][:-1]
    for text, encoded in zip(cuttable, encoders[name](cuttable), strict=True):
        parts = cut_long_text(text)
        assert "".join(parts) == text
        if all(len(part) < 2 * size for part in parts):  # no word was cut
            check(encoders[name], text, encoded)
        assert encoded.num_bytes.sum() == len(text.encode())


def test_which_tokenizers_go_over_the_ends_of_words(encoders):
    of_bytes = {name: encoder for name, encoder in encoders.items() if encoder.byte_lengths is not None}
    over = {name for name, encoder in of_bytes.items() if not keeps_words_apart(encoder.backend)}
    assert over == {"over words"}
    backend = Tokenizer.from_str(encoders["own"].backend.to_str())
    backend.add_tokens([AddedToken("New York")])
    assert not keeps_words_apart(backend)


def test_a_text_without_a_gap_is_cut_and_loses_nothing(encoders, long_texts, monkeypatch):
    monkeypatch.setattr(encoding, "PART_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 200)
    for text, encoded in zip(long_texts, encoders["own"](long_texts), strict=True):
        parts = cut_long_text(text)
        assert "".join(parts) == text and max(map(len, parts)) <= 200 and len(parts) >= len(text) // 200
        assert encoders["own"].backend.decode(encoded.input_ids[1:-1].tolist()) == text
        assert encoded.num_bytes.sum() == len(text.encode())


def test_short_texts_are_not_cut():
    text = "word " * 1000
    assert len(text) == 2 * encoding.PART_CHARACTERS
    assert cut_long_text(text) == [text] and len(cut_long_text(text + "x")) == 2


def test_a_text_without_a_gap_stays_whole_up_to_its_limit():
    text = "+" * encoding.MOST_CHARACTERS
    assert cut_long_text(text) == [text]
    assert [len(part) for part in cut_long_text(text * 2 + "+")] == [len(text), len(text), 1]


def test_tokens_of_another_program_are_as_those_of_the_text(encoders):
    for name in ("own", "gpt4o"):
        for expected in encoders[name](HARD):
            found = encoders[name].of_tokens(expected.input_ids[1:-1].astype(np.uint16))
            assert [column.tolist() for column in found[:2]] == [column.tolist() for column in expected[:2]]
            assert (found.input_ids.dtype, found.num_bytes.dtype) == (np.int32, np.uint32)


def test_parts_are_tokenized_a_few_at_a_time(encoders, long_texts, monkeypatch):
    expected = encoders["own"](long_texts)
    monkeypatch.setattr(encoding, "PARTS_TOGETHER", 2)
    for one, other in zip(encoders["own"](long_texts), expected, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.num_bytes, other.num_bytes)
