"""Speed on given text: what is read, what was computed meanwhile, how pairs are put together; KV bytes."""

import gc
import weakref

import pytest
import torch

from dynamic_transformers.data.blocks import Blocks, BlockWriter, Piece
from dynamic_transformers.data.loading import load_split, load_tokenizer
from dynamic_transformers.evaluation import efficiency
from dynamic_transformers.evaluation.efficiency import (
    DECODED_TOKENS,
    PROMPTS,
    Prompt,
    Subject,
    choose_prompts,
    in_tokens_of,
    kv_bytes_per_token,
    measure_side_by_side,
)
from tests.models.tiny import ALL, ROUTED, calibrated

VOCABULARY = 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exported models of each architecture."""
    made = {}
    for architecture in ALL:
        made[architecture] = tmp_path_factory.mktemp("models") / architecture
        calibrated(architecture, vocab_size=VOCABULARY).save_pretrained(made[architecture])
    return made


@pytest.fixture
def few(monkeypatch):
    """Five prompts of 12 given tokens."""
    monkeypatch.setattr(efficiency, "TURNS", 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (5, 32), generator=generator).tolist()
    return [Prompt(row, 20, "") for row in ids]


def split_of(blocks, length, folder):
    """A test split of random tokens."""
    ids = torch.randint(0, VOCABULARY, (blocks * length,), generator=torch.Generator().manual_seed(0))
    writer = BlockWriter(folder / "split", length, VOCABULARY)
    writer.add(Piece(ids.numpy(), ids.numpy(), None, 0))
    return Blocks(folder / "split", writer.close(), length)


@pytest.mark.parametrize(
    ("blocks", "length", "expected"), [(3, 20, 3), (63, 8, 63), (200, 8, 64), (2, 3000, 2)]
)
def test_prompts_are_different_whole_blocks_from_all_over_the_split(
    blocks, length, expected, data_dir, tmp_path
):
    """Whole, since FLOPs are counted of whole blocks."""
    split = split_of(blocks, length, tmp_path)
    prompts = choose_prompts(split, load_tokenizer(data_dir))
    assert len(prompts) == expected <= PROMPTS
    places = [blocks * number // expected for number in range(expected)]
    assert len(set(places)) == expected and places[-1] >= blocks * (expected - 1) // expected
    assert [prompt.ids for prompt in prompts] == [split.input_ids(place).tolist() for place in places]
    assert {len(prompt.ids) - prompt.prefilled for prompt in prompts} == {min(DECODED_TOKENS, length // 2)}


def test_another_tokenizer_reads_the_same_text(data_dir):
    tokenizer = load_tokenizer(data_dir)
    prompts = choose_prompts(load_split(data_dir, "test"), tokenizer)[:3]
    characters = load_tokenizer(data_dir)
    characters.backend_tokenizer.model.dropout = 0.99999  # nearly nothing is merged
    others = in_tokens_of(characters, prompts)
    for prompt, other in zip(prompts, others, strict=True):
        assert tokenizer.decode(other.ids) == prompt.text
        assert len(other.ids) > len(prompt.ids)
        assert len(other.ids) - other.prefilled == len(prompt.ids) - prompt.prefilled


def test_every_model_reads_the_given_tokens(folders, few, monkeypatch):
    """Not those that it finds likeliest; each prompt by both models before the next."""
    read = []
    load = efficiency.load_model

    def watched(folder, **options):
        model = load(folder, **options)
        model.register_forward_hook(
            lambda module, args, kwargs, output: read.append((folder.name, kwargs["input_ids"][0].tolist())),
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(efficiency, "load_model", watched)
    measure_side_by_side(Subject(folders["standard"], "fp32", few), [Subject(folders["stt"], "fp32", few)])
    for name in ("standard", "stt"):
        tokens = [ids for model, ids in read if model == name]
        given = [part for prompt in few for part in (prompt.ids[:20], *([i] for i in prompt.ids[20:]))]
        assert tokens[-len(given) :] == given  # after the warm-up
    order = [name for name, ids in read if len(ids) == 20][-10:]
    assert order == ["standard", "stt", "stt", "standard"] * 2 + ["standard", "stt"]


@pytest.mark.parametrize("architecture", ALL)
def test_the_fraction_is_that_of_the_timed_tokens(architecture, folders, few):
    standard, other = measure_side_by_side(
        Subject(folders["standard"], "fp32", few), [Subject(folders[architecture], "fp32", few)]
    )
    assert standard.timed_routed_fraction == {"prefill": {}, "decode": {}}
    assert other.timed_prompts == {"number": 5, "prefill": 20, "decode": 12}
    model = efficiency.load_model(folders[architecture])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt.ids for prompt in few]), use_cache=False)
    routing = getattr(output, "routing", None) or {}
    for work, part in (("prefill", slice(20)), ("decode", slice(20, None))):
        expected = {
            layer: result.selected[:, part].double().mean().item() for layer, result in routing.items()
        }
        assert other.timed_routed_fraction[work] == pytest.approx(expected)
    within = {*other.timed_routed_fraction["decode"].values()} - {0.0, 1.0}
    assert bool(within) == (architecture in ROUTED)


def test_two_models_are_loaded_at_a_time(folders, few, monkeypatch):
    alive: list[weakref.ref] = []
    most = []
    load = efficiency.load_model

    def counted(folder, **options):
        model = load(folder, **options)
        alive.append(weakref.ref(model))
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        return model

    monkeypatch.setattr(efficiency, "load_model", counted)
    names = (*ALL, ALL[-1])
    speeds = measure_side_by_side(
        Subject(folders["standard"], "fp32", few), [Subject(folders[name], "fp32", few) for name in names]
    )
    assert most == [1] + [2] * len(names)
    assert len(speeds) == 1 + len(names)
    assert all(
        speed.prefill_tokens_per_second > 0 < (speed.decode_tokens_per_second or 0) for speed in speeds
    )


def test_drift_of_the_machine_changes_no_ratio(folders, few, monkeypatch):
    """MoD takes half, SDT twice the time of standard, on a machine that gets slower with each pair."""
    factors = {"qwen2": 1.0, "qwen2_mod": 0.5, "qwen2_sdt": 2.0}
    pace = []

    def clock(model, function):
        function()
        if model.config.model_type != "qwen2":
            pace.append(model.config.model_type)
        return factors[model.config.model_type] * 3.0 ** len(set(pace))

    monkeypatch.setattr(efficiency, "timed", clock)
    standard, mod, sdt = measure_side_by_side(
        Subject(folders["standard"], "fp32", few),
        [Subject(folders[name], "fp32", few) for name in ("mod", "sdt")],
    )
    for speed, factor in ((mod, 0.5), (sdt, 2.0)):
        ratio = speed.prefill_tokens_per_second / standard.prefill_tokens_per_second
        assert ratio == pytest.approx(1 / factor, rel=0.2)  # the pace changes within the first prompt
        assert speed.decode_tokens_per_second / standard.decode_tokens_per_second == pytest.approx(1 / factor)


def test_the_usual_time_is_the_median_of_each_kind_of_work(folders, few, monkeypatch):
    """Of three pairs; that of prefill is of another pair than that of decoding."""
    pace = {"qwen2_mod": (1.0, 5.0), "qwen2_sdt": (2.0, 9.0), "qwen2_stt": (3.0, 7.0)}
    other = ["qwen2_mod"]

    def clock(model, function):
        function()
        if model.config.model_type != "qwen2":
            other.append(model.config.model_type)
        return pace[other[-1]][function.__name__ == "steps"]

    monkeypatch.setattr(efficiency, "timed", clock)
    speeds = measure_side_by_side(
        Subject(folders["standard"], "fp32", few),
        [Subject(folders[name], "fp32", few) for name in ("mod", "sdt", "stt")],
    )
    for speed in speeds:  # in its own pair, each is as fast as standard
        assert speed.prefill_tokens_per_second == pytest.approx(20 / 2)
        assert speed.decode_tokens_per_second == pytest.approx(12 / 7)


def test_a_rule_without_a_cache_decodes_nothing(tmp_path, few, data_dir):
    model = calibrated("mod", vocab_size=VOCABULARY, selection_rule="topk")
    model.save_pretrained(tmp_path)
    (alone,) = measure_side_by_side(Subject(tmp_path, "fp32", few), [])
    assert alone.decode_tokens_per_second is None and set(alone.timed_routed_fraction) == {"prefill"}
    assert kv_bytes_per_token(model, load_split(data_dir, "test"), 8) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ALL)
def test_kv_bytes_are_those_of_the_selected_tokens_of_the_split(architecture, dtype, folders, data_dir):
    split = load_split(data_dir, "test")
    model = efficiency.load_model(folders[architecture], dtype=dtype)
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    held = kv_bytes_per_token(model, split, 7)
    batch = split.batch(range(len(split)))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        routing = getattr(model(**inputs, use_cache=False), "routing", None) or {}
    selected = sum(result.selected.double().mean().item() for result in routing.values())
    layers = model.config.num_hidden_layers - len(routing) + selected
    token = 2 * 2 * 8 * {"fp32": 4, "bf16": 2}[dtype]  # keys and values, 2 heads of 8
    assert held == pytest.approx(token * layers, rel=1e-6 if dtype == "fp32" else 0.02)
