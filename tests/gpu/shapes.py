"""Model folders with the true shapes of Llama-2-7b and LLaVA-1.6-vicuna-7b, around SmolLM2's tokenizer.

Speed and memory are those of the real models; the weights are random, so the text is not. Shapes are those of the
published config.json files; only the vocabulary is padded to the tokenizer that is there.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 49216
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Grouped heads: a token's KV takes a quarter of Llama-2-7b's. The context is cut to what the workloads need.
LLAMA_3_8B = LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
LLAMA_3_1B = LLAMA_3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
}
# CLIP ViT-L/14 at 336 pixels, and LLaVA-1.6's way of cutting images into tiles.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LLAVA_1_6 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_seq_length": 576,
    "projector_hidden_act": "gelu",
}


def llama(tokenizer: Path, out: Path, shape: Mapping[str, object] = LLAMA_2_7B) -> Path:
    """A Llama without weights: for `--load-format dummy`."""
    _copy_tokenizer(tokenizer, out, "smollm2-135m")
    _write_config(out, shape)
    return out


def llava(tiny: Path, out: Path) -> Path:
    """LLaVA-1.6-vicuna-7b with random weights, tower included; 14 GB. `tiny` is the folder of tiny-llava."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, LlavaProcessor

    _copy_tokenizer(tiny, out, "tiny-llava")
    eyes = out / "clip-vision-tower"
    vision = CLIPVisionConfig(**CLIP_L_336)
    CLIPVisionModel(vision).half().save_pretrained(eyes)
    pixels = CLIP_L_336["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels})
    images.save_pretrained(eyes)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(out)
    text = LLAMA_2_7B | {"torch_dtype": "float16"}
    _write_config(
        out,
        text
        | LLAVA_1_6
        | {
            "mm_vision_tower": str(eyes),
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "vision_config": vision.to_dict(),
            "text_config": text,
        },
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(*size: int) -> Any:
        return (torch.randn(*size, device=device, dtype=torch.float16) * 0.02).cpu()

    hidden, inner, layers = (LLAMA_2_7B[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    assert isinstance(layers, int)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        weights = {f"{at}.self_attn.{name}_proj.weight": random(hidden, hidden) for name in "qkvo"}
        weights |= {f"{at}.mlp.{name}_proj.weight": random(inner, hidden) for name in ("gate", "up")}
        weights[f"{at}.mlp.down_proj.weight"] = random(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{norm}.weight"] = torch.ones(hidden, dtype=torch.float16)
        save_file(weights, out / f"model-{layer:02}.safetensors", metadata={"format": "pt"})
    rest = {
        "model.embed_tokens.weight": random(VOCABULARY, hidden),
        "lm_head.weight": random(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.float16),
        "model.mm_projector.0.weight": random(hidden, 1024),
        "model.mm_projector.0.bias": random(hidden),
        "model.mm_projector.2.weight": random(hidden, hidden),
        "model.mm_projector.2.bias": random(hidden),
        "model.image_newline": random(hidden),
    }
    save_file(rest, out / "model-rest.safetensors", metadata={"format": "pt"})
    return out


def _copy_tokenizer(source: Path, out: Path, name: str) -> None:
    assert source.name == name
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            shutil.copy(file, out)


def _write_config(out: Path, config: dict[str, object]) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=1))
