"""Inner tensors by name: what a tap gives, what it costs, and what it must not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import builders
import pytest
import timm
import torch
from torch import Tensor, nn
from toy_plugin import TinyNet, TwiceNet

from kdx.components import Network
from kdx.errors import ConfigError, PlanError
from kdx.taps import Tap, Tapped, classifier_of, depth_stage, is_depth, read_taps, stage_count
from kdx.types import Batch

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8},
    "resnet10t": {"channels": [8, 16, 24, 32], "stem_width": 8},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2},
    "mixer_s32_224": {"img_size": 64},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "test_mambaout": {},
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(name, in_chans=1, num_classes=3, **SMALL[name])
    return net.eval()


def batch() -> Batch:
    """Four images of 64 pixels, which every family takes."""
    return {"image": nn.functional.interpolate(builders.batch()["image"], (64, 64))}


def run(net: nn.Module, wanted: list[str], taps: Mapping[str, Tap] | None = None) -> dict[str, Tensor]:
    tapped = Tapped(Network(net), wanted, taps or {}, "student")
    tapped.train(net.training)
    tapped.protect(batch())
    return tapped(batch())


def stages(net: nn.Module) -> dict[str, Tap]:
    return {f"s{i}": Tap(i) for i in range(stage_count(net))}


# --- reading the section


def test_taps_are_stages_paths_and_sides() -> None:
    read = read_taps({"a": 2, "b": "layer3", "c": {"path": "layer3.0.act2", "side": "input"}, "d": -1}, "student.taps")
    assert read == {"a": Tap(2), "b": Tap("layer3"), "c": Tap("layer3.0.act2", "input"), "d": Tap(-1)}


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ({"logits": 1}, "student.taps.logits: 'logits' is what every model offers already; choose another name"),
        ({"depth_50": 1}, "student.taps.depth_50: 'depth_50' is what every model offers already"),
        ({"my tap": 1}, "student.taps.my tap: 'my tap' cannot be part of a ref"),
        ({"a": True}, "student.taps.a: found True, expected a stage number or the path of a module"),
        ({"a": 1.5}, "student.taps.a: found 1.5, expected a stage number or the path of a module"),
        ({"a": ""}, "student.taps.a: found '', expected a stage number or the path of a module"),
        ({"a": {"side": "input"}}, "student.taps.a: found None, expected a stage number or the path of a module"),
        ({"a": {"path": "x", "side": "left"}}, "student.taps.a.side: found 'left', expected output or input"),
        ({"a": {"path": "x", "sied": "input"}}, "student.taps.a.sied: unknown option; did you mean 'side'?"),
        ({"a": {"path": 2, "side": "input"}}, "student.taps.a: a stage number gives outputs only; name a module's"),
    ],
)
def test_a_tap_that_means_nothing_is_refused(taps: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_taps(taps, "student.taps")
    assert str(caught.value).startswith(message)


# --- timm nets


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_stages_do_not_change_the_logits(name: str, training: bool) -> None:
    net = small(name).train(training)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    state = copy.deepcopy(net.state_dict())
    plain = run(net, ["logits"])["logits"]
    net.load_state_dict(state)
    tapped = run(net, ["logits", "features", "embedding", *stages(net)], stages(net))
    torch.testing.assert_close(tapped["logits"], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_every_stage_is_a_map_and_the_same_with_and_without_an_early_stop(name: str) -> None:
    net = small(name)
    together = run(net, ["logits", *stages(net)], stages(net))
    for stage in stages(net):
        assert together[stage].ndim == 4
        torch.testing.assert_close(run(net, [stage], stages(net))[stage], together[stage], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"deit_tiny_distilled_patch16_224"}))
def test_the_embedding_is_what_the_classifier_makes_logits_of(name: str) -> None:
    net = small(name)
    found = run(net, ["embedding", "logits"])
    classifier = classifier_of(net)
    assert classifier is not None
    assert found["embedding"].ndim == 2
    torch.testing.assert_close(classifier(found["embedding"]), found["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "shape"), [
    ("resnet18", (4, 24, 4, 4)), ("vit_tiny_patch16_224", (4, 32, 4, 4)), ("mixer_s32_224", (4, 512, 2, 2)),
    ("convnext_atto", (4, 24, 4, 4)),
])  # fmt: skip
def test_a_stage_of_any_family_is_a_map_with_channels_first(name: str, shape: tuple[int, ...]) -> None:
    net = small(name)
    tap = {"mid": Tap(3 if name == "resnet18" else 2)}
    assert tuple(run(net, ["mid"], tap)["mid"].shape) == shape


def test_a_map_of_a_transformer_is_its_tokens_in_rows_without_the_prefix() -> None:
    net = small("vit_tiny_patch16_224")
    found = run(net, ["mid", "tokens"], {"mid": Tap(1), "tokens": Tap("blocks.1")})
    tokens = found["tokens"][:, 1:]
    torch.testing.assert_close(found["mid"], tokens.transpose(1, 2).reshape(4, 32, 4, 4))


def test_features_are_what_timm_calls_so() -> None:
    net = small("vit_tiny_patch16_224")
    torch.testing.assert_close(run(net, ["features"])["features"], net.forward_features(batch()["image"]))


def test_a_stage_number_may_count_from_the_end() -> None:
    net = small("resnet18")
    last, fourth = run(net, ["a"], {"a": Tap(-1)})["a"], run(net, ["b"], {"b": Tap(4)})["b"]
    assert torch.equal(last, fourth)


def test_two_names_may_stand_for_one_stage() -> None:
    found = run(small("resnet18"), ["a", "b"], {"a": Tap(2), "b": Tap(2)})
    assert torch.equal(found["a"], found["b"])


def test_the_first_of_two_classifiers_gives_the_embedding() -> None:
    net = small("deit_tiny_distilled_patch16_224")
    assert classifier_of(net) is net.head


# --- relative depths


@pytest.mark.parametrize(("name", "stage"), [("depth_100", 4), ("depth_50", 2), ("depth_20", 0), ("depth_1", 0)])
def test_a_relative_depth_is_the_stage_that_ends_that_part(name: str, stage: int) -> None:
    net = small("resnet18")
    assert depth_stage(net, name, "x") == stage
    assert torch.equal(run(net, [name])[name], run(net, ["s"], {"s": Tap(stage)})["s"])


@pytest.mark.parametrize("name", ["depth_0", "depth_101", "depth_", "depth_05", "depths_50", "depth_50x"])
def test_what_is_no_share_is_no_depth(name: str) -> None:
    assert not is_depth(name)


# --- paths


def test_a_path_gives_the_output_or_the_input_of_a_module() -> None:
    net = small("resnet18")
    taps = {"before": Tap("layer3", "input"), "after": Tap("layer3"), "previous": Tap("layer2")}
    found = run(net, [*taps], taps)
    assert torch.equal(found["before"], found["previous"])
    assert torch.equal(found["after"], net.layer3(found["before"]))


def test_paths_and_stages_agree() -> None:
    found = run(small("resnet18"), ["stage", "path"], {"stage": Tap(3), "path": Tap("layer3")})
    assert torch.equal(found["stage"], found["path"])


def test_a_pattern_may_stand_for_the_one_module_that_it_fits() -> None:
    net = small("resnet18")
    assert torch.equal(run(net, ["a"], {"a": Tap("*er3")})["a"], run(net, ["b"], {"b": Tap("layer3")})["b"])


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap("layr3"), "student.taps.a: ResNet has no module 'layr3'; did you mean 'layer3'?"),
        (
            Tap("layer?"),
            "student.taps.a: 'layer?' fits 4 modules (layer1, layer2, layer3, layer4 ...); expected one: "
            "write its path, as in layer1, and give each further module a tap of its own",
        ),
        (
            Tap("layer3.*.act?"),
            "student.taps.a: 'layer3.*.act?' fits 2 modules (layer3.0.act1, layer3.0.act2 ...); exp",
        ),
        (Tap(7), "student.taps.a: found stage 7, but ResNet has stages 0 to 4"),
        (Tap(-6), "student.taps.a: found stage -6, but ResNet has stages 0 to 4"),
    ],
)
def test_a_tap_that_is_not_in_the_net_is_refused(tap: Tap, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        run(small("resnet18"), ["a"], {"a": tap})
    assert str(caught.value).startswith(message)


def test_a_net_without_numbered_stages_is_tapped_by_paths_only() -> None:
    with pytest.raises(PlanError, match=r"^student.taps.a: TinyNet has no numbered stages; give the path of a module"):
        run(TinyNet(1, 4, 3), ["a"], {"a": Tap(1)})
    with pytest.raises(PlanError, match=r"^student: TinyNet has no numbered stages, so no 'depth_50'; name a tap"):
        run(TinyNet(1, 4, 3), ["depth_50"])
    with pytest.raises(PlanError, match=r"^student: TinyNet offers no `features`; name a tap instead"):
        run(TinyNet(1, 4, 3), ["features"])


def test_a_net_without_a_linear_layer_has_no_embedding() -> None:
    with pytest.raises(PlanError, match=r"^student: Flatten has no classifier, so no `embedding`; name a tap instead"):
        run(nn.Flatten(), ["embedding"])


def test_taps_that_nothing_reads_are_not_looked_for() -> None:
    assert set(run(small("resnet18"), ["logits"], {"unread": Tap("no.such.module")})) == {"logits"}


# --- outputs of a net


def test_a_net_may_give_named_tensors() -> None:
    net = TinyNet(1, 4, 3).eval()
    assert run(net, ["logits", "pooled"])["pooled"].shape == (4, 4)


def test_a_name_that_the_net_does_not_give_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(PlanError, match=r"^TinyNet gives no 'poled'; did you mean 'pooled'\?"):
        run(TinyNet(1, 4, 3).eval(), ["poled"])


class Odd(nn.Module):
    """Gives something else than tensors, after an inner layer that does."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.inner = nn.Flatten()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        self.inner(images)
        return self.answer


@pytest.mark.parametrize(("answer", "kind"), [(None, "NoneType"), ("x", "str"), ([], "list"), ([1], "list")])
def test_a_net_that_gives_no_tensor_is_refused(answer: Any, kind: str) -> None:
    with pytest.raises(PlanError, match=f"^Odd returns a {kind}; expected a tensor or a dict"):
        run(Odd(answer), ["logits"])


def test_a_net_that_gives_several_tensors_gives_the_first_as_logits() -> None:
    assert run(Odd((torch.ones(4, 3), torch.zeros(4, 3))), ["logits"])["logits"].sum() == 12


def test_the_output_of_a_net_does_not_matter_where_only_a_tap_is_read() -> None:
    assert run(Odd(None), ["a"], {"a": Tap("inner")})["a"].shape == (4, 64 * 64)


def test_a_module_that_gives_no_tensor_cannot_be_tapped() -> None:
    net = nn.Sequential(Odd(None), nn.Flatten())
    with pytest.raises(PlanError, match=r"^tap 'a': the module gives a NoneType, not a tensor"):
        run(net, ["a"], {"a": Tap("0")})


def test_a_module_that_does_not_run_cannot_be_tapped() -> None:
    net = Odd(torch.ones(4, 3))
    net.idle = nn.Linear(2, 2)
    with pytest.raises(PlanError, match=r"^tap 'a' of Odd: the module did not run"):
        run(net, ["a", "logits"], {"a": Tap("idle")})


# --- changes in place


@pytest.mark.parametrize("wanted", [["pre"], ["pre", "logits"]])
def test_a_tap_before_a_change_in_place_keeps_the_values_from_before_it(wanted: list[str]) -> None:
    net = TinyNet(1, 4, 3).eval()
    expected = net.norm(net.conv(batch()["image"]))
    assert expected.min() < 0
    assert torch.equal(run(net, wanted, {"pre": Tap("norm")})["pre"], expected)


def test_a_tap_before_an_addition_in_place_keeps_the_values_from_before_it() -> None:
    net = TinyNet(1, 4, 3).eval()
    expected = torch.relu(net.norm(net.conv(batch()["image"])))
    assert torch.equal(run(net, ["act", "logits"], {"act": Tap("act")})["act"], expected)


def test_an_input_that_is_changed_in_place_keeps_its_values() -> None:
    net = TinyNet(1, 4, 3).eval()
    expected = net.norm(net.conv(batch()["image"]))
    found = run(net, ["pre", "logits"], {"pre": Tap("act", "input")})
    assert torch.equal(found["pre"], expected)


def test_a_tap_before_an_activation_in_place_of_a_residual_block_holds_negative_values() -> None:
    found = run(small("resnet18"), ["pre", "post", "logits"], {
        "pre": Tap("layer2.0.act2", "input"), "post": Tap("layer2.0.act2"),
    })  # fmt: skip
    assert found["pre"].min() < 0
    assert torch.equal(found["pre"].relu(), found["post"])


def test_a_tensor_that_nothing_changes_is_not_copied() -> None:
    tapped = Tapped(Network(TinyNet(1, 4, 3).eval()), ["conv", "logits"], {"conv": Tap("conv")}, "student")
    held: list[Tensor] = []
    tapped.network.net.conv.register_forward_hook(lambda module, inputs, output: held.append(output))
    tapped.protect(batch())
    assert tapped(batch())["conv"] is held[-1]


def test_a_net_without_taps_on_its_modules_does_not_run_to_find_what_changes_them() -> None:
    net, ran = small("resnet18"), []
    net.register_forward_hook(lambda *_: ran.append("whole"))
    net.layer1.register_forward_hook(lambda *_: ran.append("layer1"))
    for wanted, taps in ((["logits"], {}), (["a", "logits"], {"a": Tap(2)})):
        Tapped(Network(net), wanted, taps, "student").protect(batch())
    assert not ran


def test_a_copied_tap_still_carries_the_gradient() -> None:
    net = TinyNet(1, 4, 3).train()
    run(net, ["pre", "logits"], {"pre": Tap("norm")})["pre"].square().sum().backward()
    assert net.conv.weight.grad is not None
    assert net.head.weight.grad is None


def test_a_module_that_runs_twice_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^tap 'a' of TwiceNet: the module runs 2 times in one pass; tap one that"):
        run(TwiceNet(1, 3), ["a"], {"a": Tap("act")})


# --- early stop and copies


def test_a_pass_ends_at_the_last_tap_that_is_read() -> None:
    net = small("resnet18")
    ran: list[str] = []
    for name in ("layer1", "layer2", "layer3", "layer4", "fc"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    for tap, last in ((Tap("layer2"), "layer2"), (Tap(2), "layer2"), (Tap("layer3", "input"), "layer2")):
        tapped = Tapped(Network(net), ["a"], {"a": tap}, "student")
        tapped.protect(batch())
        ran.clear()
        tapped(batch())
        assert ran[-1] == last
        assert tapped.stops_early


def test_a_net_can_be_used_by_itself_after_it_was_tapped() -> None:
    net = small("resnet18")
    expected = net(batch()["image"])
    tapped = Tapped(Network(net), ["a", "embedding"], {"a": Tap("layer2")}, "student")
    tapped(batch())
    torch.testing.assert_close(net(batch()["image"]), expected)


def test_an_error_in_a_net_does_not_leave_its_taps_open() -> None:
    tapped = Tapped(Network(TinyNet(1, 4, 3).eval()), ["pre"], {"pre": Tap("norm")}, "student")
    with pytest.raises(RuntimeError):
        tapped({"image": torch.zeros(2, 5, 8, 8)})
    assert tapped.network.net(batch()["image"])["logits"].shape == (4, 3)
    assert tapped(batch())["pre"].shape == (4, 4, 64, 64)


def test_a_copy_has_taps_of_its_own() -> None:
    tapped = Tapped(Network(TinyNet(1, 4, 3).eval()), ["pre", "logits"], {"pre": Tap("norm")}, "student")
    tapped.protect(batch())
    copied = copy.deepcopy(tapped)
    with torch.no_grad():
        copied.network.net.conv.weight.add_(1)
    net = copied.network.net
    assert torch.equal(copied(batch())["pre"], net.norm(net.conv(batch()["image"])))
    assert not torch.equal(copied(batch())["pre"], tapped(batch())["pre"])


def test_two_tapped_nets_on_one_network_do_not_disturb_each_other() -> None:
    network = Network(TinyNet(1, 4, 3).eval())
    one = Tapped(network, ["pre"], {"pre": Tap("norm")}, "student")
    two = Tapped(network, ["act", "logits"], {"act": Tap("act")}, "student")
    for tapped in (one, two):
        tapped.protect(batch())
    assert set(one(batch())) == {"pre"}
    assert set(two(batch())) == {"act", "logits"}
