"""model.vae: what cannot replace the base's autoencoder is refused before anything is encoded."""

import json
import shutil

import pytest
from diffusers import AutoencoderTiny

from safelight.__main__ import main
from safelight.trainer.config.schema import Model
from safelight.trainer.config.toml import to_toml
from safelight.trainer.models.base import check_vae, resolve_base, resolve_model, tiny_folder
from safelight.trainer.models.weights import load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other_vaes(tmp_path_factory):
    """Folders of autoencoders with 8 px per latent, and with 16 channels, where the tiny base has 4 and 4."""
    folder = tmp_path_factory.mktemp("vaes")
    for name, num_blocks, channels in (("coarse", 4, 4), ("deep", 3, 16)):
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * num_blocks,
            decoder_block_out_channels=(8,) * num_blocks,
            num_encoder_blocks=(1,) * num_blocks,
            num_decoder_blocks=(1,) * num_blocks,
            latent_channels=channels,
        )
        vae.save_pretrained(folder / name)
    return folder


COARSE = "makes latents 8 px wide, and model.base 'tiny' was trained on latents 4 px wide; give an autoencoder of the"
DEEP = "makes latents of 16 channels, and model.base 'tiny' was trained on latents of 4 channels; give an autoencoder"


@pytest.mark.parametrize("command", ["train", "plan", "cache"])
@pytest.mark.parametrize(("name", "message"), [("coarse", COARSE), ("deep", DEEP)])
def test_latents_of_another_kind_than_the_bases_are_refused(
    make_config, other_vaes, tmp_path, capsys, command, name, message
):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(make_config(model={"base": "tiny", "vae": str(other_vaes / name)})))
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert f"model.vae '{other_vaes / name}' {message}" in error
    assert "latents 0/" not in error, "nothing was encoded"


def test_an_untrained_base_and_one_without_a_config_of_its_own_take_any(other_vaes, tmp_path):
    check_vae(resolve_base("random:small"), str(other_vaes / "coarse"))
    base = shutil.copytree(tiny_folder(), tmp_path / "base", ignore=shutil.ignore_patterns("vae"))
    vae = str(other_vaes / "coarse")
    check_vae(resolve_model(Model(base=str(base), vae=vae)), vae)


def test_a_folder_or_file_that_cannot_be_used_is_told_by_its_setting(tiny, other_vaes, tmp_path):
    own = tiny_folder() / "vae"

    def refusal(path) -> str:
        with pytest.raises(ValueError, match=r"^model\.vae ") as error:
            load_vae(tiny, str(path), 0)
        return str(error.value)

    empty = " or leave model.vae empty for "
    folder = shutil.copytree(own, tmp_path / "cut")
    (folder / WEIGHTS).write_bytes((own / WEIGHTS).read_bytes()[:-4])
    assert "its weights are damaged or do not fit its config.json" in refusal(folder)
    assert empty in refusal(folder)
    (folder / WEIGHTS).unlink()
    assert "has no .safetensors file" in refusal(folder)
    assert empty in refusal(folder)
    folder = shutil.copytree(own, tmp_path / "misfit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layers_per_block": config["layers_per_block"] + 1}))
    assert "its .safetensors files lack" in refusal(folder)
    assert empty in refusal(folder)
    assert refusal(tiny_folder()).endswith(
        f"is the folder of a whole model; set model.vae to '{tiny_folder() / 'vae'}' in it"
    )
    assert "does not exist; give a diffusers folder of an autoencoder on this machine, which a hub id" in refusal(
        "stabilityai/sd-vae-ft-mse"
    )
    with pytest.raises(
        ValueError, match=r"does not fit model.base 'random:small'.*; a file can only be an .* of the base"
    ):
        load_vae(resolve_base("random:small"), str(own / WEIGHTS), 0)
