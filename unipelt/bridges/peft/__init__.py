"""Read and write LoRA, DoRA, (IA)3 and prompts in PEFT's folders: `adapter_config.json`, `adapter_model.safetensors`.

Reading and writing do not need PEFT. In PEFT, `lora_A` and `lora_B` are one pair for all outputs of a module. In this
package, a term belongs to queries, keys or values, and one module may compute all of them (GPT-2's `c_attn`). Two terms
of rank r become one pair of rank 2 r, with zeros where a rank does not belong to an output: the product is the same.

Shapes: r rank.
"""

import contextlib
import importlib.util

from unipelt.bridges.peft.read import load_peft
from unipelt.bridges.peft.write import save_peft
from unipelt.bridges.peft_socket import register_with_peft

__all__ = ["load_peft", "save_peft"]

if importlib.util.find_spec("peft") is not None:
    with contextlib.suppress(ImportError):  # for an unknown version of PEFT, `PeftConfig` raises the error
        register_with_peft()
