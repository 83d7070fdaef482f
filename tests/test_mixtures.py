"""The record of what a view mixes, for losses that need to know."""

from __future__ import annotations

import torch

from kdx.builtin.spoken_digits import SpokenDigits
from kdx.randomness import Randomness
from kdx.types import Batch
from kdx.views import with_views

INDEX = torch.tensor([40, 7, 300, 12])


def mixing() -> tuple[SpokenDigits, Batch]:
    data = SpokenDigits(SpokenDigits.Config(mel={}))
    return data, {**data.train().fetch(INDEX.tolist()), "index": INDEX}


def test_shares_and_partners_say_how_a_view_is_made() -> None:
    data, batch = mixing()
    viewed = with_views(data, {"mixed": {"augment": {"mixup": {}, "mixup_mel": {}}}})
    found = viewed.on_device(batch, Randomness(0, 0, INDEX))
    share = found["mix_share@mixed"]
    assert share.shape == (4,)
    assert len(set(share.tolist())) == 4
    assert found["mix_partner@mixed"].tolist() == INDEX.roll(1).tolist()
    for stream in ("image", "mel"):
        r = share.reshape(-1, 1, 1, 1)
        expected = r * found[stream] + (1 - r) * found[stream].roll(1, 0)
        torch.testing.assert_close(found[f"{stream}@mixed"], expected)


def test_a_record_is_declared_where_a_view_mixes_and_nowhere_else() -> None:
    data, _ = mixing()
    viewed = with_views(data, {"mixed": {"augment": {"mixup_mel": {}}}, "loud": {"augment": {"gain": {}}}})
    streams = viewed.facts().streams
    assert {"mix_share@mixed", "mix_partner@mixed"} <= set(streams)
    assert not {name for name in streams if name.startswith("mix_") and not name.endswith("@mixed")}
    assert data.records == {}


def test_in_evaluation_each_sample_is_itself() -> None:
    data, batch = mixing()
    found = with_views(data, {"mixed": {"augment": {"mixup_mel": {}}}}).on_device(batch, None)
    assert found["mix_share@mixed"].tolist() == [1, 1, 1, 1]
    assert torch.equal(found["mix_partner@mixed"], INDEX)
    assert torch.equal(found["mel@mixed"], found["mel"])
