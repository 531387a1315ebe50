"""Masks of volumes: windows put together again, patches in step with their masks, an adapter that learns."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptsuite.errors import DataError
from adaptsuite.host import attach
from adaptsuite.medical.seg_volume import Patches, VolumeTask, compare_volumes, segment_volume
from adaptsuite.medical.volumes import Volume
from adaptsuite.plan import Plan
from adaptsuite.trainer import fit
from adaptsuite.verify import verify

SPACING = np.diag([2.0, 1.0, 0.5, 1.0])


class Voxels(nn.Module):
    """Logits are the values, and of a second class their opposite: no voxel sees another."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return torch.cat([image, -image], 1)


def volume(shape=(20, 30, 26), seed=0):
    return Volume(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), SPACING)


@pytest.mark.parametrize("shape", [(20, 30, 26), (9, 30, 16), (8, 8, 8)])
def test_windows_are_put_together_at_their_places(shape):
    given = volume(shape)
    found = segment_volume(Voxels(), given, (16, 16, 16))
    expected = torch.stack([given.values.sigmoid(), (-given.values).sigmoid()])
    assert found.values.shape == (2, *shape) and np.array_equal(found.affine, given.affine)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)


def test_probabilities_come_back_from_another_spacing_to_the_volume_s_grid():
    d, h, w = torch.meshgrid(*(torch.arange(float(n)) for n in (16, 20, 24)), indexing="ij")
    given = Volume((d * 2 + h - w * 0.5 - 16) / 8, SPACING)  # linear in mm, so that resampling keeps it
    found = segment_volume(Voxels(), given, (16, 16, 16), spacing_mm=(1.0, 1.0, 1.0))
    assert found.shape == given.shape
    inner = (slice(2, -2),) * 3
    torch.testing.assert_close(found.values[0][inner], given.values.sigmoid()[inner], rtol=0, atol=0.02)


def test_the_mode_of_the_network_is_put_back():
    net = Voxels().train()
    segment_volume(net, volume((8, 8, 8)), (8, 8, 8))
    assert net.training


def test_masks_are_compared_in_millimetres():
    truth = torch.zeros(12, 12, 12)
    truth[3:6, 4:8, 4:8] = 1
    said = torch.zeros(2, 12, 12, 12)
    said[0, 4:7, 4:8, 4:8] = 0.9  # one slice of 2 mm further
    found = compare_volumes(Volume(said, SPACING), Volume(truth, SPACING), ("a", "b"))
    assert found["a"]["dice"] == pytest.approx(2 / 3) and found["a"]["hd95_mm"] == pytest.approx(2.0)
    assert found["b"]["dice"] == 1.0
    with pytest.raises(DataError, match="does not lie on the grid"):
        compare_volumes(Volume(said, np.eye(4)), Volume(truth, SPACING), ("a", "b"))


def lesion(shape=(24, 20, 28)):
    """A bright box off the middle, in noise, and its mask."""
    mask = torch.zeros(shape)
    mask[4:10, 12:18, 3:11] = 1
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.4
    return Volume(noise + 0.6 * mask, np.eye(4)), Volume(mask, np.eye(4))


def test_patches_are_in_step_with_their_masks():
    torch.manual_seed(0)
    data = Patches([lesion()], (16, 16, 16), per_volume=12)
    items = [data[i] for i in range(len(data))]
    for item in items:
        assert item["image"].shape == (1, 16, 16, 16) and item["mask"].shape == (16, 16, 16)
        assert torch.equal(item["image"][0] > 0.5, item["mask"] > 0)
        assert item["present"].tolist() == [int(item["mask"].any())]
    assert sum(int(i["present"][0]) for i in items) >= 6  # half of them on purpose
    assert len({tuple(i["mask"].flatten().tolist()) for i in items}) > 4


def test_small_volumes_are_padded():
    torch.manual_seed(0)
    own, mask = lesion()
    item = Patches([(own, mask)], (32, 16, 32), share=1.0)[0]
    assert item["image"].shape == (1, 32, 16, 32) and item["image"][:, 24:].abs().sum() == 0


NETS = {
    "UNETR": {"img_size": (32, 32, 32), "feature_size": 8, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2},
    "SwinUNETR": {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}


def network(name):
    import monai.networks.nets as nets

    torch.manual_seed(0)
    return getattr(nets, name)(in_channels=1, out_channels=2, **NETS[name]).eval()


@pytest.mark.parametrize("name", NETS)
def test_every_adapter_tensor_of_a_3d_network_gets_a_gradient(name):
    side = {"UNETR": 32, "SwinUNETR": 64}[name]
    net, image = network(name), torch.rand(1, 1, side, 32, 32)
    handle = attach(net, "lora", sample=(image,), head="out")
    found = verify(handle, (image,), fresh=True)
    assert found.ok, found.problems


@pytest.mark.slow
def test_an_adapter_learns_a_box_by_patches_and_finds_it_in_the_volume():
    own, mask = lesion()
    net = network("UNETR")
    handle = attach(net, "lora", sample=(torch.rand(1, 1, 32, 32, 32),), head=("encoder1", "decoder2", "out"))
    task, data = VolumeTask(("box", "nothing")), Patches([(own, mask)], (32, 32, 32), 2, per_volume=4)
    before = compare_volumes(segment_volume(net, own, (32, 32, 32)), mask, ("box", "nothing"))["box"]["dice"]
    fit(net, task, data, None, Plan(epochs=20, lr=0.01, batch_size=2, weight_decay=0.0), handle=handle)
    found = compare_volumes(segment_volume(net, own, (32, 32, 32)), mask, ("box", "nothing"))
    assert found["box"]["dice"] > max(0.5, before + 0.2) and found["nothing"]["dice"] == 1.0
