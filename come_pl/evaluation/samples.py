"""What a model says: greedy continuations, for people to read."""

from __future__ import annotations

from typing import Any

import torch

PROMPTS = ("The capital of France is", "Once upon a time, there was a", "Water boils when it")
NEW_TOKENS = 24


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS, bos: bool = False) -> str:
    """The most likely next token, again and again, until `new_tokens` or the end of the text; without the prompt.

    Args:
        bos: begin with the tokenizer's BOS, see `models.needs_bos`.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    config = model.config.get_text_config(decoder=True)
    stops = config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    device = next(model.parameters()).device
    begun = torch.tensor([[tokenizer.bos_token_id] * bos + ids], device=device)
    room = min(new_tokens, (getattr(config, "max_position_embeddings", None) or 2**31) - begun.shape[1])
    found: list[int] = []
    output = None
    while len(found) < room and not (found and found[-1] in stops):
        following = torch.tensor([found[-1:]], device=device) if output else begun
        cache = output.past_key_values if output else None
        output = model(input_ids=following, past_key_values=cache, use_cache=True, logits_to_keep=1)
        found.append(int(output.logits[0, -1].argmax()))
    # told apart from the whole, so that a word's own space stays
    whole = tokenizer.decode(ids + [token for token in found if token not in stops])
    return whole.removeprefix(tokenizer.decode(ids))
