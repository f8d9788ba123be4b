"""Adapters of a patched UNet on the kernels themselves, interpreted on a CPU or compiled on a GPU."""

import torch

from safelight.kernels.unet import patch
from safelight.kernels.unet.low_rank import adapter_of
from tests.kernels.unet.unets import inputs_of, one_block
from tests.trainer.adapters.test_lora_parity import pair, run, twin_of


def test_on_the_kernels_themselves(device):
    config = {**one_block(16, 2, 8), "norm_num_groups": 4, "sample_size": 4}
    theirs, ours = pair(config, target=["attention", "feed-forward"])
    theirs, ours.unet = theirs.float().to(device), ours.unet.float().to(device)
    patch.apply(ours.unet)
    inputs = {
        key: value.detach().to(device) if torch.is_tensor(value) else value
        for key, value in inputs_of(theirs, sides=(4, 4), batch=1).items()
    }
    target = torch.zeros(inputs["sample"].shape, device=device)
    torch.testing.assert_close(run(ours.unet, inputs, target), run(theirs, inputs, target), rtol=1e-4, atol=1e-5)
    for name, layer in ours.layers.items():
        truth = twin_of(theirs.get_submodule(name), "lora_A").grad
        assert (adapter_of(layer).lora_A.grad - truth).norm() <= 1e-3 * truth.norm() + 1e-7, name
