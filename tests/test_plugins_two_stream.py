"""One net over several streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kdx_plugins.two_stream import FusedNet, LateFusion
from torch import Tensor, nn

import kdx
from kdx.taps import Tapped, read_taps
from kdx.testing import check_model

FACTS = kdx.DataFacts(
    {
        "image": kdx.StreamFacts("image", (1, 28, 28), (0.4,), (0.3,)),
        "audio": kdx.StreamFacts("audio", (800,), (0.0,), (0.2,), rate=8000),
        "audio_mask": kdx.StreamFacts("mask", (800,)),
        "audio_present": kdx.StreamFacts("mask", ()),
        "mel": kdx.StreamFacts("image", (1, 16, 20), (-5.0,), (2.0,), present="audio_present"),
        "text": kdx.StreamFacts("vector", (5,)),
        "label": kdx.StreamFacts("label", ()),
    },
    classes=("a", "b", "c"),
    size=8,
)
ARGS = {"layers": [1] * 4, "channels": [4, 4, 4, 8], "stem_width": 4}
EYE = {"use": "timm", "model": "resnet10t", "input": "image", "args": ARGS}
EAR = {"use": "timm", "model": "resnet10t", "input": "mel", "args": {**ARGS, "channels": [4, 4, 4, 6]}}
WAVE = {"use": "wave_cnn", "input": ["audio", "audio_mask"], "channels": [4, 8], "strides": [8, 4], "kernel": 5}


def build(*streams: str, **options: Any) -> kdx.Network:
    torch.manual_seed(0)
    return LateFusion(LateFusion.Config(**options), FACTS, streams).build().eval()


def draw(name: str, count: int = 2) -> Tensor:
    about = FACTS.streams[name]
    values = torch.randn(count, *about.shape, generator=torch.Generator().manual_seed(1))
    return values > 0 if about.kind == "mask" else values


@pytest.mark.parametrize(
    ("streams", "parts"),
    [
        (("image", "mel"), {"eye": EYE, "ear": EAR}),
        (("image", "audio", "audio_mask"), {"eye": EYE, "ear": WAVE}),
        (("image", "mel", "text"), {"eye": EYE, "ear": EAR, "words": {"use": "vectors", "input": "text"}}),
    ],
)
def test_late_fusion_keeps_the_contract(streams: tuple[str, ...], parts: dict[str, Any]) -> None:
    check_model(LateFusion, facts=FACTS, streams=streams, parts=parts, hidden=7)


def test_the_classifier_reads_the_embeddings_side_by_side() -> None:
    network = build("image", "mel", parts={"eye": EYE, "ear": EAR})
    net = network.net
    assert isinstance(net, FusedNet)
    assert net.classifier.in_features == 8 + 6
    batch = {name: draw(name) for name in ("image", "mel")}
    found = Tapped(network, ("embedding", "logits"), {}, "teachers.both").eval()(batch)
    assert torch.equal(found["embedding"][:, :8], net.parts["eye"](batch["image"]))
    assert torch.equal(found["embedding"][:, 8:], net.parts["ear"](batch["mel"]))
    assert torch.equal(found["logits"], net.classifier(found["embedding"]))
    assert torch.equal(network.answer(batch), found["logits"])


def test_each_branch_normalises_with_the_statistics_of_its_stream() -> None:
    net = build("image", "mel", parts={"eye": EYE, "ear": EAR}).net
    prepared = net.get_submodule("parts.ear.prepare")(torch.full((1, 1, 16, 20), -1.0))
    assert prepared.unique().tolist() == [2.0]


def test_streams_are_told_apart_by_name_and_not_by_order() -> None:
    a = build("image", "mel", parts={"eye": EYE, "ear": EAR})
    b = build("mel", "image", parts={"eye": EYE, "ear": EAR})
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(draw("image"), draw("mel")), b(draw("mel"), draw("image")))


def test_a_branch_says_nothing_of_a_sample_without_its_modality() -> None:
    network = build("image", "mel", "audio_present", parts={"eye": EYE, "ear": {**EAR, "present": "audio_present"}})
    present = torch.tensor([True, False])
    batch = {"image": draw("image"), "mel": draw("mel"), "audio_present": present}
    embedding = Tapped(network, ("embedding",), {}, "student")(batch)["embedding"]
    assert embedding[0, 8:].any()
    assert embedding[1, 8:].count_nonzero() == 0
    assert embedding[1, :8].any()


def test_inner_tensors_of_the_parts_can_be_tapped() -> None:
    network = build("image", "mel", parts={"eye": EYE, "ear": EAR})
    taps = read_taps({"heard": "parts.ear.net.layer4"}, "student.taps")
    found = Tapped(network, ("heard",), taps, "student")({"image": draw("image"), "mel": draw("mel")})
    assert found["heard"].shape == (2, 6, 1, 1)


def test_no_weight_is_idle() -> None:
    network = build("image", "mel", parts={"eye": EYE, "ear": EAR}, hidden=5, dropout=0.1)
    network.train()(draw("image"), draw("mel")).square().sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    assert any(isinstance(module, nn.Dropout) for module in network.modules())


@pytest.mark.parametrize(
    ("streams", "options", "match"),
    [
        (("image",), {"parts": {"eye": EYE}}, "parts: found 1, expected two nets or more"),
        (("image", "mel"), {"parts": {"eye": EYE, "ear": EYE}}, "input: no part reads mel"),
        (
            ("image", "mel"),
            {"parts": {"eye": EYE, "ear": {**EAR, "input": "audio"}}},
            r"parts\.ear\.input: found 'audio'",
        ),
        (("image", "mel"), {"parts": {"eye": EYE, "ear": {**EAR, "present": "x"}}}, r"parts\.ear\.present: found 'x'"),
        (("image", "mel"), {"parts": {"eye": EYE, "ear": {"use": "timm"}}}, r"parts\.ear\.input: found None"),
        (("image", "mel"), {"parts": {"eye": EYE, "ear": "timm"}}, r"parts\.ear: found 'timm', expected a model"),
        (("image", "mel"), {"parts": {"eye": EYE, "an.ear": EAR}}, "'an.ear' cannot be part of a path"),
        (
            ("image", "mel"),
            {"parts": {"eye": EYE, "ear": {**EAR, "use": "tim"}}},
            r"parts\.ear: make: .*did you mean 'timm'",
        ),
        (
            ("image", "mel"),
            {"parts": {"eye": EYE, "ear": {**EAR, "model": "resnet"}}},
            r"parts\.ear: model: timm has no",
        ),
        (("image", "mel"), {"parts": {"eye": EYE, "ear": EAR}, "dropout": 1.0}, "hidden, dropout: found 0 and 1.0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(streams: tuple[str, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(kdx.KdxError, match=match):
        build(*streams, **options)


@pytest.mark.slow
def test_a_fused_teacher_of_either_student_is_one_run(tmp_path: Path) -> None:
    data = {
        "use": "spoken_digits",
        "labelled": 20,
        "unlabelled": "drop",
        "mel": {"bins": 8, "hop": 0.08},
        "validation": 0,
    }
    fused = {"use": "late_fusion", "input": ["image", "mel"], "parts": {"eye": EYE, "ear": EAR}}
    train = {"epochs": 1, "batch": 10}
    both = {"data": data, "student": fused, "losses": {"ce": {"use": "cross_entropy"}}, "train": train}
    for stream, part in (("image", EYE), ("mel", EAR)):
        result = kdx.run(
            {
                **both, "name": f"from_{stream}", "out": str(tmp_path), "baseline": False, "student": part,
                "teachers": {"both": {"run": both}},
                "losses": {"kd": {"use": "kd", "inputs": {"teacher": "both.logits"}}},
            },
            quiet=True,
        )  # fmt: skip
        assert kdx.load_student(result.folder).streams == (stream,)
    runs = [folder for folder in tmp_path.iterdir() if folder.is_dir() and not folder.name.startswith("from_")]
    assert len(runs) == 1
    loaded = kdx.load_student(runs[0])
    assert loaded.streams == ("image", "mel")
