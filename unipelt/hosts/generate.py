"""Describe every text architecture of the installed Transformers and write the table: `python -m unipelt.hosts.generate`.

Each model type is described from its own default configuration, by the first class of those below that it has.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from unipelt.hosts.describe import DescribeError, describe_class
from unipelt.hosts.families import Family
from unipelt.hosts.table import TABLE, to_data

HEADS = {
    "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "MaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "Seq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""What follows `AutoModelFor` -> the model types that have such a class."""
ORDER = ("Seq2SeqLM", "MaskedLM", "SequenceClassification", "CausalLM")
"""Of several classes of a type, the first of these is described: an encoder-decoder is more than its decoder."""
PROBED: dict[str, dict[str, Any]] = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
}
"""Settings of the small model that shows more than the default configuration does."""


def text_types() -> list[str]:
    """Every model type with one of the classes above."""
    return sorted({kind for names in HEADS.values() for kind in names})


def describe_type(kind: str) -> Family:
    """The family of a model type, from its default configuration. Raises `DescribeError`."""
    reasons: list[str] = []
    for head in ORDER:
        if kind not in HEADS[head]:
            continue
        try:
            family = describe_class(_auto(head), default_config(kind), PROBED.get(kind))
        except DescribeError as error:
            reasons.append(str(error))
            continue
        return _with_cross(kind, family)
    raise DescribeError(reasons[0])


def default_config(kind: str) -> Any:
    """The configuration of a model type as it is when nothing is said. Raises `DescribeError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CONFIG_MAPPING[kind]()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DescribeError(f"{kind} has no default configuration: {reason}") from error


def _auto(head: str) -> Any:
    return getattr(transformers, f"AutoModelFor{head}")


def _with_cross(kind: str, family: Family) -> Family:
    """With the attention to an encoder that the type has when its configuration asks for it."""
    if len(family.stacks) > 1 or kind not in HEADS["CausalLM"]:
        return family
    changes = {**PROBED.get(kind, {}), "is_decoder": True, "add_cross_attention": True}
    try:
        crossing = describe_class(_auto("CausalLM"), default_config(kind), changes)
    except DescribeError:
        return family
    stack, other = family.stacks[0], crossing.stacks[0]
    if len(crossing.stacks) != 1 or other.cross is None or other.layers != stack.layers:
        return family
    return Family((replace(stack, cross=other.cross),), family.refused)


def generate() -> dict[str, Any]:
    """The whole table, as JSON has it."""
    families: dict[str, Any] = {}
    without: dict[str, str] = {}
    for kind, found in _described():
        if isinstance(found, Family):
            families[kind] = to_data(found)
        else:
            without[kind] = found
    return {"transformers": transformers.__version__, "families": families, "without": without}


def _described() -> Iterator[tuple[str, Family | str]]:
    for kind in text_types():
        try:
            yield kind, describe_type(kind)
        except DescribeError as error:
            yield kind, str(error)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    data = generate()
    TABLE.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(data['families'])} families, {len(data['without'])} without a description: {TABLE}")


if __name__ == "__main__":
    main()
