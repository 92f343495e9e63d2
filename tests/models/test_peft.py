"""PEFT works on the exported models as on any of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.tiny import ALL, calibrated, logits, tokens


@pytest.mark.parametrize("architecture", ALL)
def test_lora_adapters_train_generate_and_merge(architecture):
    model, ids = calibrated(architecture), tokens(2, 16)
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], r=4)
    )
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    first = None
    for _ in range(8):
        loss = adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if first is None else first
    assert loss.item() < first
    after = {
        name.replace(".base_layer", ""): value for name, value in adapted.base_model.model.named_parameters()
    }
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    prompt = ids[:, :6]
    generated = adapted.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    before = logits(adapted, ids)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), before, atol=1e-4, rtol=1e-3)
    assert torch.equal(merged.generate(prompt, max_new_tokens=4, do_sample=False), generated)
