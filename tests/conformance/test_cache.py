"""The cache: same numbers as without it, wherever the sequence is cut, and only what it must hold."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, StaticCache

from dynamic_transformers.models.cache import EMPTY, RoutedCache, RoutedCacheLayer
from tests.models.tiny import (
    ALL,
    BACKBONE,
    CASES,
    ROUTED,
    ROUTED_STAGES,
    STAGES,
    SURPRISE,
    calibrated,
    calibrated_case,
    logits,
    short_window,
    tokens,
)

LENGTH = 24


@torch.no_grad()
def cached_logits(model, ids, cuts, mask=None, positions=None):
    """Logits of a sequence given in pieces that end at `cuts`, each with the cache of the former ones."""
    cache, pieces, start = None, [], 0
    for end in (*cuts, ids.shape[1]):
        if end == start:
            continue
        output = model(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            position_ids=None if positions is None else positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = output.past_key_values, end
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached_wherever_the_prefill_is_cut(case, attention):
    model = calibrated_case(case, attention=attention)
    ids = tokens(3, LENGTH)
    expected = logits(model, ids)
    for cut in range(1, LENGTH):
        close(cached_logits(model, ids, [cut])[0], expected)
    close(cached_logits(model, ids, range(1, LENGTH))[0], expected)  # token by token
    close(cached_logits(model, ids, [5, 6, 13])[0], expected)


@pytest.mark.parametrize("stage", STAGES)
def test_cached_batches_with_left_padding_equal_single_rows(stage):
    model = calibrated_case(stage, **short_window(stage, 6))
    lengths, prompt = (10, 4, 7), 10
    rows = [tokens(1, n + 8, seed=n) for n in lengths]
    ids, mask = torch.full((3, prompt + 8), 5), torch.zeros(3, prompt + 8, dtype=torch.long)
    for row, (n, values) in enumerate(zip(lengths, rows, strict=True)):
        ids[row, prompt - n :], mask[row, prompt - n :] = values[0], 1
    got, _ = cached_logits(model, ids, [4, prompt, *range(prompt + 1, prompt + 8)], mask)
    for row, values in enumerate(rows):
        close(got[row][mask[row] == 1], logits(model, values)[0])


@pytest.mark.parametrize("stage", ROUTED_STAGES)  # transformers' own forgets in the cache where one begins
def test_packed_documents_stay_apart_in_the_cache(stage):
    model = calibrated_case(stage, **short_window(stage, 6))
    documents = [tokens(2, length, seed=length) for length in (9, 5, 10)]
    ids = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).expand(2, -1)
    expected = torch.cat([logits(model, document) for document in documents], dim=1)
    for cuts in ([9], [7], [14, 15], range(1, 24)):
        close(cached_logits(model, ids, cuts, positions=positions)[0], expected)


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_routed_layer_stores_selected_tokens_only(architecture):
    model = calibrated(architecture)
    ids = tokens(1, LENGTH)
    _, cache = cached_logits(model, ids, [11, 12, 13])
    routing = model(input_ids=ids, use_cache=False).routing
    for index, layer in enumerate(cache.layers):
        if index in model.config.routed_layers:
            places = routing[index].selected[0].nonzero().flatten()
            assert 0 < len(places) < LENGTH
            assert layer.slots[0].tolist() == places.tolist()
            assert layer.values.shape == layer.keys.shape == (len(places), 2, 8)
        else:
            assert layer.values.shape == layer.keys.shape == (1, 2, LENGTH, 8)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("architecture", ROUTED)
def test_ragged_rows_store_no_more_than_what_they_select(architecture):
    model = calibrated(architecture)
    ids = tokens(4, LENGTH)
    _, cache = cached_logits(model, ids, range(10, LENGTH))
    routing = model(input_ids=ids, use_cache=False).routing
    for index in model.config.routed_layers:
        counts = routing[index].selected.sum(1)
        assert len(counts.unique()) > 1
        assert len(cache.layers[index].keys) == len(cache.layers[index].values) == counts.sum()
        assert (cache.layers[index].slots != EMPTY).sum(1).tolist() == counts.tolist()


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_cached_step_runs_a_block_on_the_rows_that_selected_their_token(architecture):
    model = calibrated(architecture)
    ids = tokens(6, LENGTH)
    layer = model.config.routed_layers[0]
    seen = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[:2].numel()))
    cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    seen.clear()
    selected = []
    for place in range(10, LENGTH):
        step = model(input_ids=ids[:, place : place + 1], past_key_values=cache)
        selected.append(int(step.routing[layer].selected.sum()))
        assert step.routing[layer].computed == selected[-1] / 6
    handle.remove()
    assert seen == [count for count in selected if count]
    assert len(set(seen)) > 1


@pytest.mark.parametrize("architecture", ROUTED)
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_rows_that_end_with_as_many_tokens_but_began_with_others(architecture, cut, given_selection):
    # Cut at 2, both rows end with as many tokens as the first brings: no key is missing, but queries are.
    model, ids = calibrated(architecture), tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
    given_selection(model, {layer: mask for layer in model.config.routed_layers})
    close(cached_logits(model, ids, [cut])[0], logits(model, ids))


@torch.no_grad()
def test_a_cache_made_in_inference_mode_goes_on_without_it():
    model, ids = calibrated("mod"), tokens(3, LENGTH)
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    close(model(input_ids=ids[:, 10:11], past_key_values=cache).logits, logits(model, ids)[:, 10:11])


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("change", ["reorder", "select", "mask", "repeat", "row 0", "row 1", "row 2"])
def test_rows_of_the_cache_can_be_reordered_selected_and_repeated(architecture, change):
    model = calibrated(architecture)
    ids = tokens(3, LENGTH)
    mask = torch.ones_like(ids)
    if not change.startswith("row"):  # without padding one row needs no mask, and must have no empty places
        mask[1, :4] = 0
    start = LENGTH - 6
    cache = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True).past_key_values
    if change == "repeat":
        rows = torch.tensor([0, 0, 1, 1, 2, 2])
        cache.batch_repeat_interleave(2)
    elif change == "mask":
        rows = torch.tensor([True, False, True])
        cache.batch_select_indices(rows)
    elif change == "select" or change.startswith("row"):
        rows = torch.tensor([2, 1] if change == "select" else [int(change[-1])])
        cache.batch_select_indices(rows)
    else:
        rows = torch.tensor([2, 2, 1])
        cache.reorder_cache(rows)
    expected = logits(model, ids[rows], attention_mask=mask[rows])
    for place in range(start, LENGTH):
        with torch.no_grad():
            got = model(
                input_ids=ids[rows, place : place + 1],
                attention_mask=mask[rows, : place + 1],
                past_key_values=cache,
            ).logits
        close(got[:, 0], expected[:, place])


@pytest.mark.parametrize("architecture", ROUTED)
def test_copied_rows_share_what_they_have_in_common(architecture):
    model = calibrated(architecture)
    ids = tokens(2, LENGTH)
    cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
    layer = cache.routed(1)
    first, second = layer.counts.tolist()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert len(layer.keys) == second < first + second
    with torch.no_grad():
        step = model(input_ids=ids[:, 16:17], past_key_values=cache)
    assert len(layer.keys) == second + int(step.routing[1].selected.sum())


@pytest.mark.parametrize("architecture", ROUTED)
def test_positions_go_on_from_the_cache(architecture):
    model = calibrated(architecture)
    ids = tokens(2, LENGTH)
    restarted = torch.cat([torch.arange(8), torch.arange(LENGTH - 8)]).expand(2, -1)  # two packed documents
    expected = logits(model, ids, position_ids=restarted)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], position_ids=restarted[:, :12], use_cache=True).past_key_values
        got = model(input_ids=ids[:, 12:], past_key_values=cache).logits
    close(got, expected[:, 12:])


@pytest.mark.parametrize("architecture", ROUTED)
def test_another_account_of_the_past_is_refused(architecture):
    model = calibrated(architecture)
    ids = tokens(2, LENGTH)
    _, cache = cached_logits(model, ids, range(10, LENGTH))
    mask, whole = torch.ones(2, LENGTH + 1, dtype=torch.long), torch.ones(2, LENGTH + 1, dtype=torch.long)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="differs from the one"):
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
    padded = model(input_ids=ids, attention_mask=mask[:, :LENGTH], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="differs from the one"):
        model(input_ids=ids[:, :1], attention_mask=whole, past_key_values=padded)
    model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=padded)


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_refused_crop_changes_nothing(architecture):
    model = calibrated(architecture)
    _, cache = cached_logits(model, tokens(1, LENGTH), range(10, LENGTH))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    assert {layer.get_seq_length() for layer in cache.layers} == {LENGTH}


def test_a_model_of_one_layer_routes_nothing_and_can_be_cropped():
    model = calibrated("mod", num_hidden_layers=1)
    _, cache = cached_logits(model, tokens(1, LENGTH), range(10, LENGTH))
    cache.crop(-1)
    assert cache.get_seq_length() == LENGTH - 1


@pytest.mark.parametrize("architecture", SURPRISE)
def test_router_state_holds_no_more_memory_than_it_needs(architecture):
    model = calibrated(architecture)
    _, cache = cached_logits(model, tokens(1, LENGTH), range(10, LENGTH))
    state = cache.routed(1).state
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_reset_cache_is_as_new(architecture):
    model = calibrated(architecture)
    ids = tokens(2, LENGTH)
    _, cache = cached_logits(model, ids, [])
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        output = model(input_ids=ids[:, :9], past_key_values=cache)
    close(output.logits, logits(model, ids[:, :9]))


def test_tokens_of_ragged_rows_come_back_in_the_order_of_their_rows():
    layer = RoutedCacheLayer()
    arrivals = [
        ([[0, 2], [1, EMPTY]], None, [2, 1]),
        ([[3]], [1], [0, 1]),
        ([[5, EMPTY], [4, 6]], [0, 1], [1, 2]),
        ([[7]], [0], [1, 0]),
    ]
    for slots, rows, counts in arrivals:
        slots = torch.tensor(slots)
        order, full = layer.append(slots, None if rows is None else torch.tensor(rows), counts)
        assert full == bool((order != EMPTY).all())
        states = slots[:, None, :, None].float().expand(-1, 1, -1, 4)
        keys, values = layer.update(states, -states)
        used = order != EMPTY
        assert torch.equal(keys[:, 0, :, 0].long() * used, order * used)
        assert torch.equal(values, -keys)
    assert layer.slots.tolist() == [[0, 2, 5, 7], [1, 3, 4, 6]]
    assert layer.keys[:, 0, 0].tolist() == [0, 2, 1, 3, 5, 4, 6, 7]


@pytest.mark.parametrize("make", [DynamicCache, lambda: DynamicCache(config=Qwen2Config(**BACKBONE))])
@pytest.mark.parametrize("architecture", ALL)
def test_an_empty_dynamic_cache_is_as_good_as_a_routed_one(architecture, make):
    """It is filled itself: a caller who goes on with it, and not with the output's, has the past."""
    model, ids = calibrated(architecture), tokens(2, 16)
    expected, cache = logits(model, ids), make()
    for first, last in ((0, 9), (9, 10), (10, 16)):
        with torch.no_grad():
            found = model(input_ids=ids[:, first:last], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, first:last], atol=1e-5, rtol=1e-4)
    assert isinstance(cache, RoutedCache) == (architecture in ROUTED) and cache.get_seq_length() == 16
    options = {"max_new_tokens": 4, "do_sample": False}
    expected, cache = model.generate(ids, **options), make()
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.get_seq_length() == 19
    longer = torch.cat([expected, ids[:, :2]], dim=1)  # a second turn on the same cache
    assert torch.equal(
        model.generate(longer, past_key_values=cache, **options), model.generate(longer, **options)
    )


def test_what_does_not_fit_is_refused():
    model, ids = calibrated("mod"), tokens(2, 8)
    filled = DynamicCache()
    filled.update(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), 0)
    for other in (filled, StaticCache(model.config, 8), DynamicCache(offloading=True)):
        with pytest.raises(ValueError, match="needs a RoutedCache or an empty DynamicCache"):
            model(input_ids=ids, past_key_values=other)
        with pytest.raises(ValueError, match="needs a RoutedCache or an empty DynamicCache"):
            model.generate(ids, past_key_values=other, max_new_tokens=2)
    mask = torch.tensor([[1] * 8, [1] * 6 + [0] * 2])
    padded = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pad on the left"):
        model(input_ids=ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=padded)
    with pytest.raises(ValueError, match="pad on the left"):
        model(input_ids=ids, attention_mask=torch.tensor([[1] * 8, [1] * 3 + [0] + [1] * 4]))
    cache = RoutedCache(model.config)
    model(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(input_ids=ids, attention_mask=torch.ones(2, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="training mode selects among all"):
        model.train()(input_ids=ids, past_key_values=cache)
    topk = calibrated("mod", selection_rule="topk")
    with pytest.raises(ValueError, match="'topk' selects among all"):
        topk(input_ids=ids, past_key_values=RoutedCache(topk.config))
    assert topk(input_ids=ids, use_cache=True).past_key_values is None
