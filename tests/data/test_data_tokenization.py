"""Round trip, digits, the sample that a tokenizer is trained on, and tokenizers from elsewhere."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.first_pass import sample_all
from dynamic_transformers.data.tokenization import (
    END_OF_TEXT,
    Sample,
    encoder_of,
    load_pretrained_tokenizer,
    train_tokenizer,
)
from dynamic_transformers.settings import UserError

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(make_texts):
    return train_tokenizer(make_texts(200), 500)


def encode_text(tokenizer, text):
    (encoded,) = encoder_of(tokenizer)([text])
    return encoded


@given(text=texts | texts.map(lambda text: f"{text}{END_OF_TEXT} 12 {text}"))
@settings(max_examples=200, deadline=None)
def test_round_trip_and_bytes(tokenizer, text):
    encoded = encode_text(tokenizer, text)
    end = tokenizer.eos_token_id
    assert encoded.input_ids[0] == encoded.input_ids[-1] == end
    assert end not in encoded.input_ids[1:-1]
    assert tokenizer.decode(encoded.input_ids[1:-1]) == text
    assert encoded.num_bytes[0] == encoded.num_bytes[-1] == 0
    assert encoded.num_bytes.sum() == len(text.encode())


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


@given(
    found=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=40),
    characters=st.floats(0.5, 400),
    shards=st.integers(1, 4),
)
def test_a_sample_is_the_beginning_of_a_sorted_list(found, characters, shards):
    """Also one that is made of the samples of shards, in whatever order they come."""
    by_rank = {rank: "x" * length for rank, length in dict(found).items()}
    expected, held = [], 0
    for rank, text in sorted(by_rank.items()):
        if held >= characters:
            break
        expected.append((rank, text))
        held += len(text)
    whole = Sample(characters)
    parts = [Sample(characters) for _ in range(shards)]
    for place, (rank, _) in enumerate(found):
        whole.add(rank, by_rank[rank])
        parts[place % shards].add(rank, by_rank[rank])
    merged = Sample(characters)
    for part in reversed(parts):
        for entry in part.texts():
            merged.add(*entry)
    assert whole.texts() == merged.texts() == expected
    assert whole.held == held


def test_a_tokenizers_sample_follows_the_weights(make_settings, make_source, shard_bytes):
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    sources = [make_source(name, 400, seed, weight) for seed, (name, weight) in enumerate(weights.items())]
    found = sample_all(make_settings(sources).data, 80_000)
    for start, weight in zip(("0.", "1.", "2."), weights.values(), strict=True):
        characters = sum(len(text) for text in found if text.startswith(start))
        assert 0 <= characters - weight / 4 * 80_000 < 1000
    shard_bytes(5000)
    assert sample_all(make_settings(sources, seed=5).data, 80_000) == found


def test_a_tokenizers_sample_is_of_the_training_split_and_of_each_text_once(
    make_settings, make_source, make_texts, both_passes, byte_tokenizer
):
    texts, others = make_texts(100), make_texts(100, seed=1)
    a = make_source("a", records=[{"text": text} for text in texts])
    b = make_source("b", records=[{"text": text} for text in [*texts, *others, *others]])
    settings = make_settings([a, b], min_characters=0)
    merged = both_passes(settings)
    training = [merged.texts(byte_tokenizer[0], source)["train"] for source in range(2)]
    found = sample_all(settings.data, 10**9)
    assert len(training[0]) == sum(text.startswith("0.") for text in found)
    assert sorted(found) == sorted(training[0] + training[1])
