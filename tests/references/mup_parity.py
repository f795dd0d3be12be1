"""Our mup beside the package mup 1.0.0: initial deviations, learning rates, weight decays and 20 losses.

    pip install --no-deps --target FOLDER mup==1.0.0
    PYTHONPATH=FOLDER python tests/references/mup_parity.py

writes mup_parity.json, with which test_mup.py compares. The twin is our model under the standard parametrization, with the
package's readout, its shapes and its AdamW. Attention there has scores q k / D, times the root of the base's D.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from conftest import markov_stream

from olmo_train.model.config import ModelConfig
from olmo_train.model.init import initial_value
from olmo_train.model.transformer import Transformer

FILE = Path(__file__).parent / "mup_parity.json"
WIDTH, BASE, HEADS, T, BATCH, STEPS = 64, 16, 2, 16, 4, 20
LR, DECAY, STD = 0.01, 0.1, 0.05


def shape(width: int, **changes) -> ModelConfig:
    values = {"n_heads": HEADS, "mlp_hidden": 2 * width, "vocab_size": 512, "padded_vocab_size": 512, "seq_len": T}
    return ModelConfig(d_model=width, n_layers=2, **values, init="normal", init_std=STD, **changes)


def batches() -> torch.Tensor:
    """(STEPS, BATCH, T + 1) token ids."""
    return torch.tensor(markov_stream(STEPS * BATCH * (T + 1))).view(STEPS, BATCH, T + 1)


def our_shape() -> ModelConfig:
    """The model under our mup."""
    return shape(WIDTH, parametrization="mup", base_width=BASE, base_head_dim=BASE // HEADS)


def twin(width: int) -> Transformer:
    from mup import MuReadout  # here, as the test reads this file without the package

    class Readout(MuReadout):
        def forward(self, x, labels, loss):
            return super().forward(x)

    model = Transformer(shape(width))
    model.head = Readout(width, 512, bias=False)
    scale = math.sqrt(BASE / HEADS) / (width / HEADS)
    for block in model.blocks:
        block.attn.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return model


def main() -> None:
    from mup import MuAdamW, set_base_shapes

    model = set_base_shapes(twin(WIDTH), twin(BASE), delta=twin(2 * BASE), rescale_params=False)
    ours = our_shape()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_value(name, parameter.shape, ours, seed=1))
    infinite = {name: p.infshape.ninf() for name, p in model.named_parameters()}
    deviations = {
        name: STD * (p.infshape.width_mult() ** -0.5 if infinite[name] == 2 else 1) for name, p in model.named_parameters()
    }
    optimizer = MuAdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: [g["lr"], g["weight_decay"]] for g in optimizer.param_groups for p in g["params"]}
    losses = []
    for tokens in batches():
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    values = {"readout_multiplier": 1 / model.head.width_mult(), "deviations": deviations, "rates": rates, "losses": losses}
    FILE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
