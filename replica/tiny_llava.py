"""tiny-llava: a real LLaVA-1.5 model (CLIP tower, projector, Llama language model) with toy eyes.

The language model is SmolLM2-135M. The eyes, a 3-layer CLIP tower and LLaVA's projector, are trained here in under a
minute to turn each patch of 14 x 14 pixels into the word embedding of its colour: the model names plain colours and
sees nothing else. SGLang's whole image path is real, so a machine without a GPU can test it with this model.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaProcessor,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (35, 60, 220),
    "yellow": (240, 220, 40),
    "orange": (245, 140, 25),
    "purple": (130, 40, 170),
    "pink": (250, 150, 190),
    "black": (12, 12, 12),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "brown": (110, 65, 25),
}
PATCH, SIDE = 14, 4  # pixels a patch, patches a side: an image is 56 x 56 pixels, 16 patches
STEPS, BATCH = 700, 48
WORST_ERROR = 0.05  # relative, of the projected patches; a good training ends near 0.005
VOCABULARY = 49216  # SmolLM2's 49,152 tokens and <image>, rounded up to a multiple of 64

# SmolLM2's own template with places for images, and a system prompt without which it seldom says what it sees: asked
# about 11 colours in 7 ways, it names 70 of 77 with the prompt and 39 without.
TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are an assistant that sees images as words of color. \
Answer questions about the image with the color that you see.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>
' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def make(text: Path, out: Path, report: Callable[[int, int], None]) -> None:
    """Writes the model to `out`, given SmolLM2 in `text`. Calls report(steps done, steps in total).

    Raises RuntimeError if training fails.
    """
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float16)
    language.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PATCH * SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    tower = CLIPVisionModel(vision)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=language.config.to_dict())
    projector = LlavaMultiModalProjector(config)
    side = PATCH * SIDE
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    words = [tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in COLOURS]
    meanings = language.get_input_embeddings().weight.detach().float()[words]
    error = _train(tower, projector, processor, meanings, report)
    if error > WORST_ERROR:
        raise RuntimeError(f"its eyes did not learn their colours (relative error {error:.3f})")
    _write(out, text, language, tokenizer, tower, projector, processor)


def _train(
    tower: Any, projector: Any, processor: Any, meanings: torch.Tensor, report: Callable[[int, int], None]
) -> float:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    parameters = [*tower.parameters(), *projector.parameters()]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
    error = float("inf")
    for step in range(STEPS):
        images, colours = _images(BATCH)
        seen = tower((images - mean) / std, output_hidden_states=True).hidden_states[-2][:, 1:]
        loss = (projector(seen) - meanings[colours]).pow(2).mean() / meanings.pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        error = loss.item()
        report(step + 1, STEPS)
    return error


def _images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of one or two colours, [count, 3, pixels, pixels] in 0..1, and the patches' colours, [count, 16]."""
    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float)
    pair = torch.randint(len(COLOURS), (count, 2, 1, 1))
    mixed = (torch.rand(count, 1, 1) < 0.5) & (torch.rand(count, SIDE, SIDE) < 0.5)
    grid = torch.where(mixed, pair[:, 1], pair[:, 0])
    patches = rgb[grid] + torch.randn(count, SIDE, SIDE, 3) * 10
    pixels = patches.permute(0, 3, 1, 2).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    pixels = pixels + torch.randn(count, 3, PATCH * SIDE, PATCH * SIDE) * 3
    return pixels.clamp(0, 255) / 255, grid.flatten(1)


def _write(out: Path, text: Path, language: Any, tokenizer: Any, tower: Any, projector: Any, processor: Any) -> None:
    """Writes the folder in liuhaotian's layout, which SGLang's LlavaLlamaForCausalLM loads."""
    out.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in language.state_dict().items() if name != "lm_head.weight"}
    for place, linear in ((0, projector.linear_1), (2, projector.linear_2)):
        weights[f"model.mm_projector.{place}.weight"] = linear.weight.data.half()
        weights[f"model.mm_projector.{place}.bias"] = linear.bias.data.half()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    # SGLang recognises a CLIP tower by its path and needs that path to be absolute: the preset adds it at each start.
    eyes = out / "clip-vision-tower"
    tower.half().save_pretrained(eyes)
    processor.save_pretrained(eyes)
    config = language.config.to_dict()
    config.pop("_name_or_path", None)
    config |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": VOCABULARY,
        "torch_dtype": "float16",
        "mm_vision_tower": eyes.name,
        "mm_hidden_size": tower.config.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": SIDE * SIDE,
        "projector_hidden_act": "gelu",
        "vision_config": tower.config.to_dict(),
        "text_config": language.config.to_dict(),
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(out)
    LlavaProcessor(
        image_processor=processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(out)
    shutil.copy(text / "generation_config.json", out)
