"""The inside of self-attention as a tap: equal to what an unfused forward pass of timm computes."""

from __future__ import annotations

import copy
from typing import Any

import builders
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.components import Network
from kdx.errors import ConfigError, PlanError
from kdx.heads import GIVES
from kdx.tap_list import tappable
from kdx.taps import Tap, Tapped, read_taps

SIZES: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(name, in_chans=1, num_classes=3, **{**SIZES, **options})
    return net.eval()


def run(net: nn.Module, wanted: list[str], **taps: Tap) -> dict[str, Tensor]:
    tapped = Tapped(Network(net), wanted, taps, "student")
    tapped.train(net.training)
    tapped.protect(builders.batch())
    return tapped(builders.batch())


def inside(path: str) -> dict[str, Tap]:
    return {what: Tap(path, give=what) for what in GIVES}


def seen_in(module: nn.Module, net: nn.Module) -> Tensor:
    """What enters a module in an unfused forward pass of the net."""
    net = copy.deepcopy(net)
    for block in net.blocks:
        block.attn.fused_attn = False
    found: list[Tensor] = []
    module = dict(net.named_modules())[module]
    module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    net(builders.batch()["image"])
    return found[0]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_attn_norm": True}])
def test_attention_is_what_an_unfused_pass_of_timm_computes(fused: bool, options: dict[str, Any]) -> None:
    net = vit(**options)
    for name, parameter in net.named_parameters():
        if "norm" in name:  # norms that are not the identity
            nn.init.uniform_(parameter, 0.5, 1.5)
    for block in net.blocks:
        block.attn.fused_attn = fused
    found = run(net, [*GIVES], **inside("blocks.1.attn"))
    expected = seen_in("blocks.1.attn.attn_drop", net)
    assert expected.shape == (4, 2, 17, 17)
    torch.testing.assert_close(found["attention"], expected)
    torch.testing.assert_close(found["attention"].sum(-1), torch.ones(4, 2, 17))
    together = (found["attention"] @ found["values"]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(together, seen_in("blocks.1.attn.norm", net))


def test_scores_queries_and_keys_belong_together() -> None:
    net = vit(qk_norm=True)
    found = run(net, [*GIVES], **inside("blocks.2.attn"))
    assert found["queries"].shape == found["keys"].shape == found["values"].shape == (4, 2, 17, 16)
    torch.testing.assert_close(found["scores"], found["queries"] @ found["keys"].transpose(2, 3) / 16**0.5)
    torch.testing.assert_close(found["attention"], found["scores"].softmax(3))
    attended = F.scaled_dot_product_attention(found["queries"], found["keys"], found["values"])
    torch.testing.assert_close(attended.transpose(1, 2).flatten(2), seen_in("blocks.2.attn.proj", net))


def test_attention_carries_a_gradient_and_leaves_the_logits_alone() -> None:
    net = vit()
    plain = net(builders.batch()["image"])
    found = run(net, ["logits", "attention"], attention=Tap("blocks.0.attn", give="attention"))
    torch.testing.assert_close(found["logits"], plain)
    found["attention"].square().sum().backward()
    weight = net.blocks[0].attn.qkv.weight.grad
    assert weight is not None
    assert weight[:64].any()
    assert not weight[64:].any()  # values take no part in attention


def test_a_pass_for_attention_ends_in_that_block() -> None:
    net = vit()
    ran: list[str] = []
    net.blocks[1].attn.proj.register_forward_hook(lambda *_: ran.append("proj"))
    tapped = Tapped(Network(net), ["a"], {"a": Tap("blocks.1.attn", give="attention")}, "student")
    tapped.protect(builders.batch())
    ran.clear()
    tapped(builders.batch())
    assert not ran
    assert tapped.stops_early


def test_dropout_of_attention_is_no_reason_to_refuse_and_modes_come_back() -> None:
    net = vit(attn_drop_rate=0.5).train()
    net.blocks[0].eval()
    found = run(net, ["attention"], attention=Tap("blocks.1.attn", give="attention"))
    torch.testing.assert_close(found["attention"].sum(-1), torch.ones(4, 2, 17))
    assert net.blocks[1].attn.training


def test_a_copy_reads_its_own_attention() -> None:
    tapped = Tapped(Network(vit()), ["a"], {"a": Tap("blocks.0.attn", give="attention")}, "student")
    copied = copy.deepcopy(tapped)
    before = tapped(builders.batch())["a"]
    with torch.no_grad():
        copied.network.net.blocks[0].attn.qkv.weight.mul_(3)
        copied.network.net.blocks[0].attn.num_heads = 4
    assert copied(builders.batch())["a"].shape == (4, 4, 17, 17)
    assert torch.equal(tapped(builders.batch())["a"], before)


def test_a_pattern_may_name_the_attention_module() -> None:
    net = vit()
    one = run(net, ["a"], a=Tap("*.2.attn", give="attention"))["a"]
    assert torch.equal(one, run(net, ["a"], a=Tap("blocks.2.attn", give="attention"))["a"])


@pytest.mark.parametrize(
    ("name", "options", "path", "message"),
    [
        ("vit_tiny_patch16_224", {}, "blocks.0", "needs plain self-attention, but Block has no layer `qkv`"),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}, "blocks.0.attn", "those of plain attention: q_bias"),
        ("vit_relpos_base_patch16_224", {}, "blocks.0.attn", "besides those of plain attention: rel_pos.mlp"),
    ],
)  # fmt: skip
def test_what_is_no_plain_attention_is_refused(name: str, options: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(PlanError, match=rf"^student\.taps\.a: .*{message}"):
        run(vit(name, **options), ["a"], a=Tap(path, give="attention"))


def test_rotary_positions_are_noticed_by_what_the_module_computes() -> None:
    net = vit("vit_small_patch16_rope_224")
    assert type(net.blocks[0].attn).__name__ == "AttentionRope"
    with pytest.raises(PlanError, match=r"^AttentionRope does more than softmax\(q k\^T\) v, such as relative"):
        run(net, ["a"], a=Tap("blocks.0.attn", give="attention"))


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ({"path": "a", "give": "attentions"}, r"x\.t\.give: found 'attentions', expected one of attention, sco"),
        ({"path": "a", "give": "keys", "side": "input"}, r"x\.t\.give: it goes with the path of an attention"),
        ({"path": 2, "give": "keys"}, r"x\.t\.give: it goes with the path of an attention module"),
        ({"path": "a", "gives": "keys"}, r"x\.t\.gives: unknown option; did you mean 'give'\?"),
    ],
)  # fmt: skip
def test_a_tap_inside_of_attention_is_read_strictly(tap: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_taps({"t": tap}, "x")


def test_a_config_taps_attention_of_student_and_teacher() -> None:
    taps = {"taps": {"att": {"path": "blocks.1.attn", "give": "attention"}}}
    plan = builders.plan_of(
        {"student": None},
        {"student": {**builders.VIT, **taps}, "teachers": {"vit": {**builders.VIT, **taps}},
         "losses": {"att": {"use": "mse", "inputs": {"student": "student.att", "teacher": "vit.att"}}}}
    )  # fmt: skip
    assert plan.shapes["student.att"] == plan.shapes["vit.att"] == (2, 17, 17)
    _, losses = builders.forward(plan, builders.batch())
    assert losses.terms["att"].mean() > 0


def test_the_list_of_taps_has_the_inside_of_attention() -> None:
    found = {item.tap: item.gives for item in tappable(Network(vit(depth=1)), builders.batch())}
    assert found["{path: blocks.0.attn, give: attention}"] == (2, 17, 17)
    assert found["{path: blocks.0.attn, give: values}"] == (2, 17, 16)
    net = timm.create_model("resnet18", in_chans=1, num_classes=3, layers=[1, 1, 1, 1], channels=[4, 4, 4, 4])
    assert not any("give" in item.tap for item in tappable(Network(net), builders.batch()))
