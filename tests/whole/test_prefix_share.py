"""`examples/prefix_share.py`: shares of attention, against scores written out for one head at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import prefix_share
import pytest
import torch
from tiny_task import save_model, write_glue
from transformers import AutoModel, AutoTokenizer

TEXTS = [["a b c d e", "b a"], ["c", "d e a b c"]]


def test_a_share_is_that_of_scores_of_zero(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "model"))
    found = prefix_share.prefix_shares(folder, TEXTS, 7, [1.0, 0.1])
    model: Any = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():  # scores that tell heads apart
        for layer in model.encoder.layer:
            layer.attention.self.query.bias.fill_(2.0)
    model.save_pretrained(folder)
    other = prefix_share.prefix_shares(folder, TEXTS, 7, [1.0, 0.1])
    assert (found - other).abs().max() > 1e-3, "it depends on the model's scores"
    batch = AutoTokenizer.from_pretrained(folder)(*TEXTS, padding=True, return_tensors="pt")
    inner = model.encoder.layer[0].attention.self
    with torch.no_grad():
        states = model.embeddings(input_ids=batch["input_ids"], token_type_ids=batch.get("token_type_ids"))
        for head in range(inner.num_attention_heads):
            rows = slice(head * inner.attention_head_size, (head + 1) * inner.attention_head_size)
            for which, gate in enumerate((1.0, 0.1)):
                shares = []
                for text, mask in zip(states, batch["attention_mask"].bool(), strict=True):
                    query, key = (projection(text)[mask][:, rows] for projection in (inner.query, inner.key))
                    own = (query @ key.t() / math.sqrt(inner.attention_head_size)).exp().sum(1)
                    shares.append(7 * gate / (7 * gate + own))
                # new keys are near zero, not at it
                assert other[which, 0, head].item() == pytest.approx(torch.cat(shares).mean().item(), abs=2e-3)


def test_the_command_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    write_glue(tmp_path / "glue")
    words = ["--model", str(folder), "--task", "rte", "--glue_dir", str(tmp_path / "glue"), "--rows", "5"]
    monkeypatch.setattr("sys.argv", ["prefix_share.py", *words, "--gate", "1", "1e-9"])
    prefix_share.main()
    first, whole, closed = capsys.readouterr().out.strip().splitlines()
    assert first.endswith("5 rows of rte, a new prefix of 10 tokens")
    assert whole.startswith("gate 1: it takes ")
    assert float(whole.split("takes ")[1].split()[0]) > 10
    assert closed.startswith("gate 1e-09: it takes 0.0 % of all attention, more than half in 0 and")
