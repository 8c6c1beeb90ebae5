"""LoRA, DoRA, (IA)3 and prompts into and out of PEFT's folders: `adapter_config.json` and `adapter_model.safetensors`.

Both are read and written here, without PEFT. What PEFT calls a module's `lora_A` and `lora_B` is one pair for all that
the module computes; here a term belongs to queries, keys or values, of which one module may hold all (GPT-2's
`c_attn`). Two terms of r ranks are one pair of 2 r, with zeros where a rank has nothing to say: the same product.

Shapes: r rank.
"""

import contextlib
import importlib.util

from unipelt.bridges.peft.read import load_peft
from unipelt.bridges.peft.write import save_peft
from unipelt.bridges.peft_socket import register_with_peft

__all__ = ["load_peft", "save_peft"]

if importlib.util.find_spec("peft") is not None:
    with contextlib.suppress(ImportError):  # a PEFT that is not known: asking for `PeftConfig` says so
        register_with_peft()
