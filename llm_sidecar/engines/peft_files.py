"""The files of a PEFT adapter, and checks that it is a plain LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from llm_sidecar.errors import AdapterRejected

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
"""PEFT's other formats are pickles."""

_MAX_CONFIG: Final = 1 << 20
"""Maximum size of a configuration in bytes; PEFT writes a few thousand."""
_MATRIX: Final = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_PLAIN_INITIALIZATIONS: Final = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that do not change the model's own weights. All others, such as
`pissa`, change them before training."""
_UNSUPPORTED: Final = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
"""Settings of adapters that do more than add the product of two matrices."""


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        AdapterRejected: it is missing or invalid, or the adapter is not a plain LoRA.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterRejected(f"it holds no {name}")
    if (folder / CONFIG_FILE).stat().st_size > _MAX_CONFIG:
        raise AdapterRejected(f"its {CONFIG_FILE} is larger than {_MAX_CONFIG >> 20} MB")
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (ValueError, RecursionError):
        raise AdapterRejected(f"its {CONFIG_FILE} is not JSON") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterRejected(f"its {CONFIG_FILE} is not that of a LoRA adapter")
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise AdapterRejected(f"it is trained with {setting}, which is not supported")
    if config.get("init_lora_weights") not in _PLAIN_INITIALIZATIONS:
        raise AdapterRejected(
            f"it begins with init_lora_weights={config['init_lora_weights']!r} and so belongs to "
            "changed weights; have PEFT convert it to plain LoRA (path_initial_model_for_weight_"
            "conversion)"
        )
    return config


def matrix_of(key: str) -> tuple[str, str]:
    """(module, `A` or `B`) of a tensor of the adapter.

    Raises:
        AdapterRejected: it is not a LoRA matrix, and would replace a weight of the model.
    """
    match = _MATRIX.fullmatch(key)
    if match is None:
        raise AdapterRejected(f"it holds {key}, which is not a LoRA matrix")
    return match[1], match[2]
