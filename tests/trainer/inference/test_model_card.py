"""The model card of an export: its front matter, what it says of the run, strangers' texts as texts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from safelight.errors import UserError
from safelight.trainer.config.toml import load_config, parse_config
from safelight.trainer.inference.export import export, export_of
from safelight.trainer.inference.gallery import save_png
from safelight.trainer.inference.model_card import CardFacts, License, card_text, escaped, license_of
from safelight.trainer.models.base import Base, base_of, tiny_folder
from safelight.trainer.report.evaluation import Estimate, EvaluatedModel, Evaluation, Metric
from safelight.trainer.report.run_reader import read_run_folder
from tests.trainer.inference.exported_runs import STEP


@pytest.fixture
def run(tiny_run, tmp_path) -> Path:
    """A run with samples, counts and credits."""
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    folder = run / "samples" / f"step-{STEP:08d}"
    folder.mkdir(parents=True)
    rows = []
    for number, prompt in enumerate(["a red barn", "a | <b>hen</b> `x` [y](z)\n# no"]):
        save_png(Image.new("RGB", (32, 32), (200, 40 * number, 0)), folder / f"{number}.png", f"{prompt}\nSteps: 9")
        row = {"file": f"{number}.png", "prompt": prompt, "seed": 4, "cfg": 7.0, "num_steps": 9, "sampler": "euler-a"}
        rows.append({**row, "negative_prompt": "blurry" * number})
    index = {"step": STEP, "epoch": 2.0, "images": rows}
    (folder / "index.json").write_text(json.dumps(index))
    names = ["Ann A.", "Ann A.", "Bo <script>alert(1)</script>"]
    data = {
        "num_photos": 40,
        "num_train": 36,
        "num_validation": 4,
        "num_captions": 39,
        "caption_sources": [{"source": "text files", "captioner": "", "num": 38}],
        "credits": [{"photographer": name, "page": "https://x"} for name in names],
    }
    (run / "data.json").write_text(json.dumps(data))
    return run


def front_matter(card: Path) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card.read_text(), re.DOTALL)[1])


def test_a_folder_has_a_card_and_samples(run, tmp_path):
    done = export(run, tmp_path / "mine")
    values = front_matter(tmp_path / "mine" / "README.md")
    assert (values["license"], values["library_name"], values["pipeline_tag"]) == (
        *("apache-2.0", "diffusers", "text-to-image"),
    )
    assert {"stable-diffusion", "text-to-image", "safelight"} <= set(values["tags"])
    # no id on the hub
    assert "base_model" not in values
    assert [row["output"]["url"] for row in values["widget"]] == ["samples/00.png", "samples/01.png"]
    original = run / "samples" / f"step-{STEP:08d}" / "0.png"
    assert (tmp_path / "mine" / "samples" / "00.png").read_bytes() == original.read_bytes()
    text = (tmp_path / "mine" / "README.md").read_text()
    for part in (
        f"# run step {STEP}",
        "## Samples",
        "![](samples/00.png)",
        "from_pretrained",
        "torch.float16",
        "guidance_scale=7",
        "## Training",
        "| optimizer | adamw8bit, weight decay 0.01 |",
        "40 photographs, of which 4 were held out of training; 39 captions.",
        "Captions: 38 by text files.",
        "With thanks to 2 photographers of 3 photographs: Ann A. (2)",
        "## License",
    ):
        assert part in text, part
    # the hub's own reader
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "apache-2.0"
    assert done.card_files == []
    # an export that is made again replaces it
    export(run, tmp_path / "mine", force=True)


def test_strangers_texts_are_shown_as_they_are(run, tmp_path):
    export(run, tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    assert "<script" not in body
    assert "<b>" not in body
    assert r"a \| &lt;b&gt;hen&lt;/b&gt; \`x\` \[y\]\(z\) \# no" in body
    table = [line for line in body.splitlines() if line.startswith("| ![](samples/01.png)")]
    assert len(table) == 1
    assert "negative: blurry" in table[0]
    assert front_matter(tmp_path / "mine" / "README.md")["widget"][1]["text"] == "a | <b>hen</b> `x` [y](z) # no"


@pytest.mark.parametrize(
    "text", ["a\nb", "---\nlicense: mit\n---", "| x |", "<img src=x>", "*a* _b_ ~c~ $d$", "\x1b[31m"]
)
def test_an_escaped_text_is_one_line_without_markup(text):
    shown = escaped(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)[|*_`~$<>\[\]]", shown)


def test_a_file_has_a_card_beside_it_on_request(run, tmp_path):
    assert export(run, tmp_path / "plain.safetensors").card_files == []
    assert not (tmp_path / "plain.md").exists()
    done = export(run, tmp_path / "mine.safetensors", card=True)
    assert [path.relative_to(tmp_path).as_posix() for path in done.card_files] == [
        "mine.md",
        "mine-samples/00.png",
        "mine-samples/01.png",
    ]
    text = (tmp_path / "mine.md").read_text()
    assert "![](mine-samples/00.png)" in text
    assert "Copy `mine.safetensors` to A1111's" in text
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(UserError, match=r"mine\.md, where the model card goes, already exists; add --force"):
        export(run, tmp_path / "mine.safetensors", card=True)
    export(run, tmp_path / "mine.safetensors", card=True, force=True)


def test_a_run_that_recorded_nothing_has_a_card(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "## Samples" not in text
    assert "## Data" not in text
    assert not (tmp_path / "mine" / "samples").exists()


def test_samples_that_are_no_pictures_are_left_out(run, tmp_path):
    folder = run / "samples" / f"step-{STEP:08d}"
    (folder / "0.png").write_bytes(b"not a picture")
    (folder / "1.png").unlink()
    (folder / "1.png").symlink_to(run / "config.toml")
    export(run, tmp_path / "mine")
    assert not (tmp_path / "mine" / "samples").exists()
    index = json.loads((folder / "index.json").read_text())
    index["images"][0]["file"] = "../../../run/config.toml"
    (folder / "index.json").write_text(json.dumps(index))
    export(run, tmp_path / "mine", force=True)
    assert not (tmp_path / "mine" / "samples").exists()


def test_what_was_evaluated_is_in_the_card(run):
    models = [EvaluatedModel(id="base", step=0, epoch=0.0), EvaluatedModel(id=f"step-{STEP}", step=STEP, epoch=2.0)]
    values = tuple(
        Estimate(model=model.id, value=value, low=value - 1, high=value + 1, num=30)
        for model, value in zip(models, (5.0, 3.0), strict=True)
    )
    metric = Metric(id="kid", title="KID", meaning="how far", better="lower", features="CLIP", values=values)
    evaluation = Evaluation(
        **{"models": tuple(models), "num_prompts": 30, "num_real": 40, "width": 64, "height": 64, "num_steps": 9},
        **{"cfg": 7.0, "sampler": "dpm++", "metrics": (metric,)},
    )
    (run / "evaluation.json").write_text(evaluation.model_dump_json())
    config = load_config(run / "config.toml")
    facts = CardFacts(run, config, base_of(config.model), STEP, "mine", "the UNet", "Load it.", "finetune")
    text = card_text(facts, read_run_folder(run), [], License("mit", "its own model card"))
    assert "30 prompts, 40 photographs to compare with, 64x64 px, 9 steps, cfg 7" in text
    assert r"| KID, by CLIP (lower is better) | 5 [4, 6] | 3 [2, 4] |" in text
    # of another checkpoint nothing was measured
    facts = CardFacts(run, config, base_of(config.model), STEP + 1, "mine", "the UNet", "Load it.", "finetune")
    assert "## Evaluation" not in card_text(facts, read_run_folder(run), [], License("mit", "its own model card"))


def stated(tmp_path, readme: str | None, spec: str = "", fetch=None) -> License:
    folder = tmp_path / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder(), folder)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return license_of(Base(spec or str(folder), folder), fetch)


def test_the_license_is_the_bases_own_words_or_unknown(tmp_path):
    assert stated(tmp_path, "---\nlicense: creativeml-openrail-m\n---\n# SD").id == "creativeml-openrail-m"
    other = stated(tmp_path, "---\nlicense: other\nlicense_name: sdxl\nlicense_link: LICENSE.md\n---\n")
    assert (other.id, other.name, other.link) == ("other", "sdxl", "LICENSE.md")
    for readme in (
        None,
        "# no front matter",
        "---\nlicense: [a\n---\n",
        "---\nlicense: 3\n---",
        "---\nlicense: 'a b'\n---",
    ):
        assert stated(tmp_path, readme).id == "unknown", readme
    # of a hub id whose snapshot has no card, the hub is asked
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n")
    assert stated(tmp_path, None, "somebody/model", lambda spec: card).id == "mit"

    def unreachable(spec):
        raise UserError("no network")

    assert stated(tmp_path, None, "somebody/model", unreachable).id == "unknown"


def test_a_base_on_the_hub_is_named_in_the_front_matter(run):
    config = load_config(run / "config.toml")
    base = Base("somebody/model", tiny_folder())
    facts = CardFacts(run, config, base, STEP, "mine", "the UNet", "Load it.", "finetune")
    licence = License("other", "its own model card", "My License 1.0", "https://x/LICENSE")
    text = card_text(facts, read_run_folder(run), [], licence)
    values = yaml.safe_load(text.split("---\n")[1])
    assert (values["base_model"], values["base_model_relation"]) == ("somebody/model", "finetune")
    assert (values["license"], values["license_name"], values["license_link"]) == (
        *("other", "my-license-1-0", "https://x/LICENSE"),
    )


@pytest.mark.parametrize(
    ("tables", "tag", "row"),
    [
        (
            {
                "adapter": {
                    **{"kind": "lora", "rank": 8, "dropout": 0.1, "dora": True, "rslora": True},
                    **{"target": ["attention", "up_blocks.*.conv1"], "base": "nf4"},
                }
            },
            "lora",
            r"rank 8, alpha 8, dropout 0.1, DoRA, rank-stabilized, on attention, up\_blocks.\*.conv1, base in nf4",
        ),
        (
            {
                "adapter": {"kind": "embedding"},
                "embedding": {"word": "<fade>", "vectors": 2, "initial_text": "a print"},
            },
            "textual_inversion",
            r"&lt;fade&gt;, 2 vectors from 'a print', trained on \{word\}, \{caption\}",
        ),
        ({"train": {"layers": ["attention", "conv_in=0.1"]}}, "", "attention, conv\\_in=0.1"),
    ],
)
def test_a_card_says_what_was_trained_of_the_model(run, tables, tag, row):
    config = parse_config({"run": {"dir": str(run)}, "optimizer": {"lr": 1e-4}, **tables}, "here")
    kind, base = export_of(config, merge=False), Base("somebody/model", tiny_folder())
    facts = CardFacts(run, config, base, STEP, "mine", kind.trained(config), "Load it.", kind.relation, kind.tag)
    text = card_text(facts, read_run_folder(run), [], License("mit", "its own model card"))
    values = yaml.safe_load(text.split("---\n")[1])
    assert values["base_model_relation"] == ("adapter" if tag else "finetune")
    assert {"lora", "textual_inversion"} & set(values["tags"]) == ({tag} if tag else set())
    name = {"lora": "LoRA", "textual_inversion": "word", "": "trained layers"}[tag]
    assert f"| {name} | {row} |" in text
    others = {"LoRA", "word", "trained layers"} - {name}
    assert not any(f"| {other} |" in text for other in others)
