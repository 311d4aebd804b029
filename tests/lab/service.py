"""What a lab replica says about itself: probes, model, server info, loads, metrics."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from tests.lab.knobs import Knobs
from tests.lab.seen import Seen

JSON = "application/json"
VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Load:
    """The state of the generations, as /v1/loads and /metrics show it."""

    running: int
    waiting: int
    used_tokens: int
    total_tokens: int
    max_running: int
    gen_throughput: float
    cache_hit_rate: float

    @property
    def token_usage(self) -> float:
        return round(self.used_tokens / self.total_tokens, 2)


def load_from(seen: Seen, knobs: Knobs) -> Load:
    """The load in plain mode, where every generation runs at once."""
    running = seen.generations_started - seen.generations_finished - seen.generations_aborted
    return Load(running, 0, 0, knobs.max_total_tokens, knobs.max_running_requests, 0.0, 0.0)


PATHS = (
    "/v1/models",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/v1/loads",
    "/metrics",
)


def describe(path: str, knobs: Knobs, random_seed: int, seen: Seen, load: Load) -> tuple[str, bytes]:
    """Content type and body of one of PATHS."""
    match path:
        case "/v1/models":
            return JSON, orjson.dumps(_models(knobs))
        case "/model_info" | "/get_model_info":
            return JSON, orjson.dumps(_model_info(knobs))
        case "/server_info" | "/get_server_info":
            return JSON, orjson.dumps(_server_info(knobs, random_seed, load))
        case "/v1/loads":
            return JSON, orjson.dumps(_loads(load))
        case "/metrics":
            return "text/plain; version=0.0.4; charset=utf-8", _metrics(knobs, seen, load)
        case _:
            raise ValueError(f"{path} informs of nothing")


def _models(knobs: Knobs) -> dict[str, Any]:
    card = {"id": knobs.served_model, "object": "model", "created": int(time.time()), "owned_by": "sglang"}
    return {"object": "list", "data": [card | {"root": knobs.served_model, "parent": None, "max_model_len": 4096}]}


def _model_info(knobs: Knobs) -> dict[str, Any]:
    return {
        "model_path": knobs.served_model,
        "served_model_name": knobs.served_model,
        "tokenizer_path": knobs.served_model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "load_format": "auto",
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


def _server_info(knobs: Knobs, random_seed: int, load: Load) -> dict[str, Any]:
    arguments = {
        "model_path": knobs.served_model,
        "tokenizer_path": knobs.served_model,
        "served_model_name": knobs.served_model,
        "reasoning_parser": knobs.reasoning_parser or None,
        "max_running_requests": None,
        "page_size": 1,
        "random_seed": random_seed,
        "api_key": knobs.api_key or None,
        "admin_api_key": None,
        "enable_cache_report": True,
    }
    state = {
        "effective_max_running_requests_per_dp": load.max_running,
        "last_gen_throughput": load.gen_throughput,
    }
    return arguments | {
        "max_total_num_tokens": load.total_tokens,
        "internal_states": [arguments | state],
        "version": VERSION,
    }


def _loads(load: Load) -> dict[str, Any]:
    core = {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": load.running,
        "num_waiting_reqs": load.waiting,
        "num_waiting_uncached_tokens": 0,
        "num_used_tokens": load.used_tokens,
        "num_total_tokens": load.used_tokens,
        "num_active_tokens": load.used_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": load.total_tokens,
        "max_running_requests": load.max_running,
        "token_usage": load.token_usage,
        "gen_throughput": load.gen_throughput,
        "cache_hit_rate": load.cache_hit_rate,
        "utilization": 0.0,
    }
    top = {"timestamp": datetime.now(UTC).isoformat(), "version": VERSION}
    return top | {"accelerator": None, "num_accelerators": 1, "loads": [core]}


def _metrics(knobs: Knobs, seen: Seen, load: Load) -> bytes:
    service = f'engine_type="unified",model_name="{knobs.served_model}"'
    shard = f'{service},moe_ep_rank="0",pp_rank="0",tp_rank="0"'
    gauges = {
        "num_running_reqs": load.running,
        "num_queue_reqs": load.waiting,
        "num_used_tokens": load.used_tokens,
        "token_usage": load.token_usage,
        "gen_throughput": load.gen_throughput,
        "cache_hit_rate": load.cache_hit_rate,
        "max_total_num_tokens": load.total_tokens,
    }
    lines = []
    for name, value in gauges.items():
        lines += [f"# TYPE sglang:{name} gauge", f"sglang:{name}{{{shard}}} {float(value)}"]
    if seen.generations_aborted:  # SGLang's counters appear with their first count
        name = "sglang:num_aborted_requests_total"
        lines += [f"# TYPE {name} counter", f"{name}{{{service}}} {float(seen.generations_aborted)}"]
    return ("\n".join(lines) + "\n").encode()
