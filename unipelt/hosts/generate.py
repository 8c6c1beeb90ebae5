"""Describe all architectures of the installed Transformers that read text: `python -m unipelt.hosts.generate`.

The command writes the table, `table.json`. Each model type is described from its own default configuration, by the
first class of those below that it has.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from unipelt.hosts.describe import DescribeError, describe_small
from unipelt.hosts.description import Family
from unipelt.hosts.shrink import CannotShrink, build_small
from unipelt.hosts.small_settings import SETTINGS
from unipelt.hosts.table import TABLE, to_data

HEADS = {
    "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "MaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "Seq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "ImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
"""The end of the name of an `AutoModelFor...` -> the model types that have such a class."""
ORDER = ("Seq2SeqLM", "MaskedLM", "CausalLM", "SequenceClassification", "ImageTextToText")
"""The order in which a type's classes are described; the first counts, so an encoder-decoder is before its decoder."""


def text_types() -> list[str]:
    """Return every model type that has a class of `HEADS`, sorted."""
    return sorted({kind for names in HEADS.values() for kind in names})


def small_of(kind: str, head: str, changes: dict[str, Any] | None = None) -> PreTrainedModel:
    """Build a small model of a type with a head, from the type's default configuration.

    Raises `DescribeError` if the model cannot be built.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[kind]()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DescribeError(f"{kind} has no default configuration: {reason}") from error
    try:
        auto = getattr(transformers, f"AutoModelFor{head}")
        return build_small(auto, config, {**SETTINGS.get(kind, {}), **(changes or {})})
    except CannotShrink as error:
        raise DescribeError(str(error)) from error


def describe_type(kind: str) -> dict[str, Family]:
    """Return the families of a model type, by the `config.model_type` of its models.

    The key is the type itself or, for a multimodal model, the type of its text part.

    Raises:
        DescribeError: none of the type's classes could be described.
    """
    found: dict[str, Family] = {}
    errors: list[DescribeError] = []
    for head in ORDER:
        if kind not in HEADS[head]:
            continue
        try:
            small = small_of(kind, head)
            own = small.config.model_type
            if own not in found:
                found[own] = _with_cross(kind, describe_small(small))
        except DescribeError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _with_cross(kind: str, family: Family) -> Family:
    """Return a family with the attention to an encoder, if the type has one in another configuration."""
    if len(family.stacks) > 1 or kind not in HEADS["CausalLM"]:
        return family
    try:
        crossing = describe_small(small_of(kind, "CausalLM", {"is_decoder": True, "add_cross_attention": True}))
    except DescribeError:
        return family
    stack, other = family.stacks[0], crossing.stacks[0]
    if len(crossing.stacks) != 1 or other.cross is None or other.layers != stack.layers:
        return family
    return Family((replace(stack, cross=other.cross),), family.refused)


def generate() -> dict[str, Any]:
    """Return the whole table, as data for JSON."""
    families: dict[str, Family] = {}
    without: dict[str, str] = {}
    for kind in text_types():
        try:
            for own, family in describe_type(kind).items():
                if own == kind or own not in families:
                    families[own] = family
        except DescribeError as error:
            without[kind] = str(error)
    return {
        "transformers": transformers.__version__,
        "families": {kind: to_data(families[kind]) for kind in sorted(families)},
        "without": {kind: reason for kind, reason in without.items() if kind not in families},
    }


def main() -> None:
    """Write the table to `table.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    data = generate()
    TABLE.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(data['families'])} families, {len(data['without'])} without a description: {TABLE}")


if __name__ == "__main__":
    main()
