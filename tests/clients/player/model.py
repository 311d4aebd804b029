"""A model for SGLang that plays what its prompt asks for, for programs that otherwise need a large model.

Tokenizer, chat template, parsers, protocols and streams are SGLang's own; only which token comes next is played instead
of computed. SGLANG_EXTERNAL_MODEL_PACKAGE=tests.clients.player brings it in; folder.py makes its folder.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from torch import nn
from transformers import AutoTokenizer

from tests.clients.player.part import part

SURE = 1e4  # a logit that leaves no other token a chance
# Where a grammar forbids what is played, the first of these that it allows comes next, so that JSON soon ends.
ENDINGS = ("<|im_end|>", "}", '"', "]", "{", "[", ":", "0")


class PlayerForCausalLM(nn.Module):
    """It sees whole prompts: its server runs without chunks of prefill and without a cache of prefixes."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.size = config.vocab_size
        self.weight = nn.Parameter(torch.zeros(1))  # for whoever asks where the model is
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["PLAYER_FOLDER"])
        self.end = config.eos_token_id
        self.others = torch.zeros(self.size)
        for liking, text in enumerate(reversed(ENDINGS), 1):
            self.others[self.tokenizer.convert_tokens_to_ids(text)] = liking * 100.0
        self.played: dict[int, list[int]] = {}  # by the request's place in the pool: the tokens that are left

    @torch.no_grad()
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None) -> Any:
        places = forward_batch.req_pool_indices.tolist()
        if forward_batch.forward_mode.is_extend():
            begin = 0
            for place, length in zip(places, forward_batch.extend_seq_lens.tolist(), strict=True):
                prompt = self._text(input_ids[begin : begin + length])
                self.played[place] = self.tokenizer.encode(part(prompt), add_special_tokens=False)
                begin += length
        logits = self.others.repeat(len(places), 1)
        for row, place in enumerate(places):
            left = self.played.get(place)
            logits[row, left.pop(0) if left else self.end] = SURE
        return LogitsProcessorOutput(next_token_logits=logits)

    def _text(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """There are none."""


EntryClass = PlayerForCausalLM
