"""lm-eval's interface over our models: likelihoods row by row, and what each task makes a model compute."""

import itertools

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.evaluation.language_model import CountingLM
from dynamic_transformers.training.flops import forward_flops
from tests.models.tiny import ALL, ROUTED, calibrated

TEXTS = ["12 + 30", "5 * 7 = 35", "1 + 1 = 2. 2 + 2 = 4. 4 + 4 = 8", "9 - 3 = 6 because 6 + 3 = 9"]
CHOICES = [" 4", " 5", " 42", " six", " 12 34 56"]


def instances(kind, arguments, task):
    return [Instance(kind, {}, a, i, metadata=(task, i, 1)) for i, a in enumerate(arguments)]


def language_model(architecture, data_dir, batch_size=3, **options) -> CountingLM:
    tokenizer = load_tokenizer(data_dir)
    model = calibrated(architecture, vocab_size=len(tokenizer), **options)
    return CountingLM(model, tokenizer, batch_size, 128)


@torch.no_grad()
def alone(model: PreTrainedModel, context: list[int], continuation: list[int]):
    """Log-likelihood, whether greedy, and what was selected, of one row without padding."""
    outputs = model(input_ids=torch.tensor([context + continuation[:-1]]), use_cache=False)
    logits = outputs.logits[0, -len(continuation) :].log_softmax(-1)
    target = torch.tensor(continuation)
    routing = getattr(outputs, "routing", None) or {}
    return (
        logits.gather(1, target[:, None]).sum().item(),
        bool((logits.argmax(-1) == target).all()),
        {layer: result.selected[0] for layer, result in routing.items()},
    )


@pytest.mark.parametrize(
    ("architecture", "options"),
    [*((name, {}) for name in ALL), ("mod", {"selection_rule": "topk"})],
)
def test_tasks_are_answered_and_counted_as_their_rows_alone(architecture, options, data_dir):
    lm = language_model(architecture, data_dir, **options)
    tasks = {
        "short": [(text, choice) for text in TEXTS[:2] for choice in CHOICES],
        "long": [(text, choice) for text in TEXTS[2:] for choice in CHOICES],
    }
    requests = [r for task, pairs in tasks.items() for r in instances("loglikelihood", pairs, task)]
    requests = requests[::2] + requests[1::2]  # lm-eval gives the tasks' requests together
    answers = lm.loglikelihood(requests)
    for task, pairs in tasks.items():
        rows = {}
        for pair in pairs:
            context, continuation = lm._encode_pair(*pair)
            score, greedy, selected = alone(lm.model, context, continuation)
            place = next(i for i, r in enumerate(requests) if r.args == pair and r.task_name == task)
            assert answers[place][0] == pytest.approx(score, abs=1e-4)
            assert answers[place][1] == greedy
            rows[tuple(context + continuation[:-1])] = selected
        realised = lm.counts[task].realised(lm.model.config)
        assert realised.tokens == sum(map(len, rows))
        flops = sum(
            len(row)
            * forward_flops(
                lm.model.config, len(row), {layer: m.double().mean().item() for layer, m in selected.items()}
            ).total()
            for row, selected in rows.items()
        )
        assert realised.forward_flops_per_token == pytest.approx(flops / realised.tokens)
        for layer, spread in realised.layers.items():
            chosen = sum(int(selected[layer].sum()) for selected in rows.values())
            assert spread.mean == pytest.approx(chosen / realised.tokens)
    if architecture in ROUTED:
        assert lm.counts["short"].realised(lm.model.config) != lm.counts["long"].realised(lm.model.config)


def test_rows_that_differ_in_the_last_token_are_read_once(data_dir):
    lm = language_model("mod", data_dir)
    pairs = [(TEXTS[2], f" {digit}") for digit in range(10)]
    encoded = [lm._encode_pair(*pair) for pair in pairs]
    answers = lm.loglikelihood(instances("loglikelihood", pairs, "task"))
    rows = {tuple(context + continuation[:-1]) for context, continuation in encoded}
    assert len(rows) < len(pairs)
    assert lm.counts["task"].realised(lm.model.config).tokens == sum(map(len, rows))
    assert [a for a, _ in answers] == pytest.approx([alone(lm.model, *pair)[0] for pair in encoded], abs=1e-4)


def test_long_texts_are_scored_window_by_window_and_cut_contexts_are_told(data_dir, caplog):
    lm = language_model("stt", data_dir)
    lm._max_length = 16
    caplog.clear()
    text = TEXTS[2] * 4
    tokens = lm.tok_encode(text)
    (total,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)], "rolling"))
    expected = alone(lm.model, [lm.prefix_token_id], tokens[:16])[0]
    for start in range(16, len(tokens), 16):
        stop = min(start + 16, len(tokens))
        expected += alone(lm.model, tokens[stop - 17 : start], tokens[start:stop])[0]
    assert total == pytest.approx(expected, abs=1e-3)
    assert not caplog.messages
    lm.loglikelihood(instances("loglikelihood", [(text, " 4")], "cut"))
    assert caplog.messages == ["cut: 1 texts are longer than the model's 16 tokens, and are cut on the left"]


@pytest.mark.parametrize("architecture", ALL)
def test_generated_tokens_are_counted_where_they_are_computed(architecture, data_dir):
    lm = language_model(architecture, data_dir, batch_size=2)
    options = {"until": ["never"], "max_gen_toks": 5, "do_sample": False}
    prompts = [TEXTS[0], TEXTS[2]]
    answers = lm.generate_until(instances("generate_until", [(p, options) for p in prompts], "task"))
    realised = lm.counts["task"].realised(lm.model.config)
    lengths = [len(lm.tok_encode(prompt)) for prompt in prompts]
    assert realised.tokens == sum(lengths) + 2 * 4  # the fifth token is not read
    assert len(answers) == 2
    if architecture in ROUTED:
        selected = []
        for prompt in prompts:
            ids = torch.tensor([lm.tok_encode(prompt)])
            whole = lm.model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, :-1]
            with torch.no_grad():
                routing = lm.model(input_ids=whole, use_cache=False).routing
            selected.append({layer: int(result.selected.sum()) for layer, result in routing.items()})
        for layer, spread in realised.layers.items():
            assert spread.mean == pytest.approx(sum(s[layer] for s in selected) / realised.tokens)


@pytest.mark.parametrize("ends", ["stop strings", "EOS tokens"])
@pytest.mark.parametrize(
    ("architecture", "options"), [*((name, {}) for name in ALL), ("mod", {"selection_rule": "topk"})]
)
def test_a_generated_row_is_counted_up_to_its_own_stop(architecture, options, ends, data_dir):
    # With tied embeddings an untrained model says the same token again and again.
    lm = language_model(architecture, data_dir, batch_size=1, tie_word_embeddings=False, **options)

    def tokens_of(prompt):
        ids = torch.tensor([lm.tok_encode(prompt)])
        return lm.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()

    def length(row, until):
        """Tokens up to the first of `until`."""
        return next((n for n in range(1, 13) if any(stop in lm.tok_decode(row[:n]) for stop in until)), 13)

    # Two rows, each with a stop that the other does not have before its own.
    rows = {text: tokens_of(text) for text in (*TEXTS, *CHOICES)}
    single = [lm.tok_decode([token]) for row in rows.values() for token in row]
    stops = list(dict.fromkeys(stop for stop in single if stop.isascii() and stop.isprintable()))
    prompts, until, lengths = next(
        ([one, other], [x, y], [a, b])
        for one, other in itertools.combinations(rows, 2)
        for x, y in itertools.combinations(stops, 2)
        if 1 < (a := length(rows[one], [x])) < 11
        and a == length(rows[one], [x, y])
        and 1 < (b := length(rows[other], [y])) < 11
        and b == length(rows[other], [x, y])
        and abs(a - b) > 2
    )
    if ends == "EOS tokens":
        lm.model.generation_config.eos_token_id = [lm.tok_encode(stop)[0] for stop in until]
        until = ["never"]

    def generated(batch_size):
        lm.batch_size_per_gpu, lm.counts = batch_size, {}
        asked = {"until": until, "max_gen_toks": 12, "do_sample": False}
        answers = lm.generate_until(instances("generate_until", [(p, asked) for p in prompts], "task"))
        return answers, lm.counts["task"].realised(lm.model.config)

    answers, alone = generated(1)
    together, counted = generated(2)
    assert together == answers
    read = 0
    for prompt, new in zip(prompts, lengths, strict=True):
        size = len(lm.tok_encode(prompt))
        # The last token is not read. Top-k has no cache: it reads the row anew for each token.
        read += sum(size + step for step in range(new)) if options else size + new - 1
    assert alone.tokens == counted.tokens == read
    assert counted.forward_flops_per_token == pytest.approx(alone.forward_flops_per_token)
    for layer, spread in counted.layers.items():
        assert spread.mean == pytest.approx(alone.layers[layer].mean)


def test_all_beams_are_counted(data_dir):
    lm = language_model("mod", data_dir, tie_word_embeddings=False)
    asked = {"until": [" 4"], "max_gen_toks": 5, "do_sample": False, "num_beams": 3, "early_stopping": True}
    lm.generate_until(instances("generate_until", [(p, asked) for p in TEXTS[:2]], "task"))
    read = 3 * sum(len(lm.tok_encode(prompt)) + 4 for prompt in TEXTS[:2])
    assert lm.counts["task"].realised(lm.model.config).tokens == read
