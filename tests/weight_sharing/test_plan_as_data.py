"""``gm.plan.as_dict()``: which layer gets what, for programs."""

from __future__ import annotations

import json

import asdl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import asdl_ws_plugin  # noqa: F401  (shared_dim)
from asdl_ws_plugin import attach_padding


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight
        self.other = nn.Linear(4, 5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.frozen(self.embed(tokens))
        h = torch.tanh(self.first(x) + self.second(x) + self.other(x)) * mask.unsqueeze(-1)
        return self.head(h.sum(1) / mask.sum(1, keepdim=True))


def test_the_plan_as_data_is_json_and_says_what_was_settled() -> None:
    torch.manual_seed(0)
    model = Net()
    attach_padding(model, "auto")
    gm = asdl.KfacGradientMaker(
        model,
        asdl.PreconditioningConfig(damping=1e-2, ignore_modules=["other"]),
        fisher_type="fisher_emp",
        shared_dim=["auto", ("head", "expand")],
    )
    before = json.loads(json.dumps(gm.plan.as_dict()))
    assert before["setting"] is None
    by_name = {layer["name"]: layer for layer in before["layers"]}
    assert set(by_name) == {"frozen", "first", "head"}
    assert by_name["first"]["strategy"] is None and by_name["head"]["strategy"] == "expand"
    assert by_name["first"]["tied"] == ["second"] and by_name["first"]["class"] == "Linear"
    assert by_name["frozen"]["frozen"] and not by_name["head"]["frozen"]
    assert set(before["left_out"]) == {"embed"}  # and not what ignore_modules says

    tokens, y = torch.randint(0, 9, (4, 6)), torch.randint(0, 3, (4,))
    mask = torch.arange(6) < torch.tensor([6, 3, 2, 4])[:, None]
    gm.setup_loss_call(F.cross_entropy, gm.setup_model_call(model, tokens, mask), y)
    gm.forward_and_backward()
    after = json.loads(json.dumps(gm.plan.as_dict()))
    by_name = {layer["name"]: layer for layer in after["layers"]}
    assert after["setting"] == by_name["first"]["strategy"] == "reduce"
    assert by_name["first"]["layout"] == "batch_first"
    of_first = {"call": 0, "mask": {"name": "mask", "before": 0, "after": 0}}
    assert of_first in by_name["first"]["positions"]
    assert by_name["head"]["positions"] == []

    model.frozen.requires_grad_(True)
    by_name = {layer["name"]: layer for layer in gm.plan.as_dict()["layers"]}
    assert not by_name["frozen"]["frozen"]
