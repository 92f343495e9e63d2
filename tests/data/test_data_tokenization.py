"""Round trip, digits, byte counts, and tokenizers from elsewhere."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.documents import Document
from dynamic_transformers.data.tokenization import (
    END_OF_TEXT,
    _bytes_of_tokens,
    encode,
    load_pretrained_tokenizer,
    train_tokenizer,
)
from dynamic_transformers.settings import UserError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(make_texts):
    return train_tokenizer(make_texts(200), 500)


def encode_text(tokenizer, text):
    (encoded,) = encode(tokenizer, [Document(text, "a", b"")])
    return encoded


@given(text=texts | texts.map(lambda text: f"{text}{END_OF_TEXT} 12 {text}"))
@settings(max_examples=200, deadline=None)
def test_round_trip_and_bytes(tokenizer, text):
    encoded = encode_text(tokenizer, text)
    end = tokenizer.eos_token_id
    assert encoded.input_ids[0] == encoded.input_ids[-1] == end
    assert end not in encoded.input_ids[1:-1]
    assert tokenizer.decode(encoded.input_ids[1:-1]) == text
    assert encoded.num_bytes.min() >= 0 and encoded.num_bytes[0] == encoded.num_bytes[-1] == 0
    assert encoded.num_bytes.sum() == len(text.encode())


def test_bytes_of_each_token_by_hand():
    tokenizer = train_tokenizer(["aaaa"], 257)  # bytes only: a character of n bytes is n tokens
    encoded = encode_text(tokenizer, "aé東🙂b")
    assert encoded.num_bytes.tolist() == [0, 1, 2, 0, 3, 0, 0, 4, 0, 0, 0, 1, 0]


def test_offsets_that_step_back_count_no_byte_twice():
    assert _bytes_of_tokens("abécd", [(0, 1), (1, 3), (1, 2), (3, 5)]).tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("unit", ["abcdefgh", "東京", " ", "=-", "\n\t"])
def test_a_megabyte_without_a_gap_takes_seconds(unit):
    rng = random.Random(0)
    text = "".join(rng.choices(unit, k=1_000_000))
    started = time.process_time()
    trained = train_tokenizer([text], 300)
    assert time.process_time() - started < 20  # quadratic, it took ten minutes
    assert len(trained) > 258 and trained.decode(trained(text[:5000])["input_ids"]) == text[:5000]


def test_digits_stand_alone(tokenizer):
    assert tokenizer.tokenize(" 1234 + 5") == ["Ġ", "1", "2", "3", "4", "Ġ+", "Ġ", "5"]


def test_a_tokenizer_from_a_folder_with_its_own_beginning(tmp_path):
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet(), 2)}}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2: offsets without spaces
    backend.normalizer = normalizers.Strip()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path
    )
    encoded = encode_text(load_pretrained_tokenizer(str(tmp_path)), "é  a  ")
    assert encoded.input_ids[0] == 0 and encoded.input_ids[-1] == 1
    assert encoded.num_bytes.sum() == len("é  a  ".encode())


def test_mistakes_are_told_in_one_line(tmp_path):
    for name in ("nobody/nothing", str(tmp_path)):
        with pytest.raises(UserError, match=f"data.tokenizer_name={name}") as error:
            load_pretrained_tokenizer(name)
        assert "\n" not in str(error.value)
