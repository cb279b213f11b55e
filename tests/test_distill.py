"""distill.py from end to end, each part, on networks of a few thousand parameters."""

import shutil

import pytest
import torch

import distill
from data.pairs import FolderOfPictures
from losses.gradient import gradient_loss, pixel_loss
from nets.depthmaster import DepthMaster
from tests.worlds import CROP, call, comes_back, files, interrupt, run, streets

PARTS = {"decoder": ["pixel", "gradient"], "encoder": ["latent", "prediction"],
         "unet": ["latent", "feature"]}
SMALL = ["--width", 8, "--blocks", 1]


@pytest.fixture(params=PARTS)
def part(request):
    return request.param


@pytest.fixture
def train(files, monkeypatch, part):
    """train(out, *options): runs the part's distillation; the rows of its log."""
    words = ["--drop", "mid"] if part == "unet" else []
    return lambda out, *options, data=files / "pairs": run(
        monkeypatch, distill, out, "--ckpt", files / "stage1.safetensors", "--part", part, *words,
        *SMALL, "--data", data, *options)


def test_a_run_leaves_what_it_promises(part, train, files, tmp_path):
    rows = train(tmp_path)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    weights = dict(zip(PARTS[part], (1, 0.1 if part == "unet" else 1)))
    for row in steps:
        assert row["loss"] == pytest.approx(sum(weights[name] * row[name] for name in weights))
    assert [row["step"] for row in rows if "validation" in row] == [2, 4]
    before = DepthMaster.from_file(files / "stage1.safetensors")
    after = DepthMaster.from_file(tmp_path / "model.safetensors")
    assert (after.kind, after.train_size) == (before.kind, before.train_size)
    trained = {"decoder": "tiny_decoder.", "encoder": "tiny_encoder.", "unet": "unet."}[part]
    new = after.state_dict()
    for name, tensor in before.state_dict().items():
        if not name.startswith(trained):
            assert torch.equal(new[name], tensor), f"{name} should be frozen"
    if part == "unet":
        assert not any(name.startswith("unet.mid") for name in new)
        assert not torch.equal(new["unet.conv_in.weight"],
                               before.state_dict()["unet.conv_in.weight"])
    else:
        assert after.approximate and any(name.startswith(trained) for name in new)


def test_the_loss_falls(part, train, tmp_path):
    rows = train(tmp_path, "--steps", 60, "--lr", 3e-3, "--log-every", 10, "--validate-every", 99)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_a_resumed_run_is_the_same_to_the_bit(train, tmp_path, monkeypatch):
    train(tmp_path / "whole")
    revive = interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut")
    revive()
    train(tmp_path / "cut")
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_a_lost_model_file_comes_back(train, tmp_path):
    assert comes_back(lambda: train(tmp_path), tmp_path / "model.safetensors")


def test_micro_batches_cache_and_recomputing_do_not_change_the_result(train, tmp_path):
    def losses(out, *options):
        return [row["loss"] for row in train(tmp_path / out, *options) if "loss" in row]
    plain = losses("plain")
    assert losses("micro", "--micro-batch", 4) == pytest.approx(plain, rel=1e-4)
    assert losses("recomputed", "--checkpoint-activations", "on") == pytest.approx(plain, rel=1e-4)
    cached = losses("cached", "--cache", tmp_path / "cache", "--cache-precision", "float32")
    assert cached == pytest.approx(plain, rel=1e-4)


def test_pictures_without_depth(part, train, files, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    shutil.copytree(files / "pairs/train/rgb", pictures / "deep/below")
    rows = train(tmp_path / "run", data=pictures)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert "without depth: no validation during training" in capsys.readouterr().err
    (pictures / "deep/below/0.png").write_text("no picture")
    with pytest.raises(ValueError, match="1 samples can't be used"):
        train(tmp_path / "other", "--preflight", data=pictures)


def test_depth_that_comes_later_is_another_run_with_other_entries(files, tmp_path, monkeypatch):
    """The folder, the names and the sizes stay the same."""
    data = tmp_path / "data"
    shutil.copytree(files / "pairs/train/rgb", data / "rgb")

    def losses(out):
        rows = run(monkeypatch, distill, tmp_path / out, "--ckpt", files / "stage1.safetensors",
                   "--data", data, "--cache", tmp_path / "cache", *SMALL)
        return [row["loss"] for row in rows if "loss" in row]

    before = losses("without")
    shutil.copytree(files / "pairs/train/depth", data / "depth")
    assert losses("with") != before
    with pytest.raises(ValueError, match="readers: .'FolderOfPictures'. then"):
        losses("without")


def test_pictures_of_one_name_are_two_samples(tmp_path, files):
    for name in ("a.png", "a.jpg"):
        shutil.copy(files / "pairs/train/rgb/0.png", tmp_path / name)
    reader = FolderOfPictures(tmp_path)
    assert [reader.name(0), reader.name(1)] == ["a.jpg", "a.png"]


def test_the_decoder_s_objective_against_its_parts(files):
    model = DepthMaster.from_file(files / "stage1.safetensors")
    objective = distill.objective_of(model, "decoder", [], 8, 1)
    image = torch.randint(256, (2, 3, 35, 50), dtype=torch.uint8)
    target = torch.rand(2, 1, 35, 50) * 2 - 1
    losses = objective({"image": image, "target": target})
    with torch.no_grad():
        z, _ = model.unet(model.vae.encode(image / 127.5 - 1))
        truth = model.vae.encode(target.expand(-1, 3, -1, -1))
        for name, loss in (("pixel", pixel_loss), ("gradient", gradient_loss)):
            both = []
            for latent in (z, truth):
                whole = model.vae.decode(latent).mean(1, keepdim=True)
                student = model.tiny_decoder(latent)
                both.append(loss(student, whole, torch.ones_like(whole, dtype=torch.bool)))
            torch.testing.assert_close(losses[name], sum(both) / 2)


def test_a_second_part_and_a_second_run_go_on(files, tmp_path, monkeypatch):
    """The encoder beside the decoder; then the decoder again, from what it was."""
    def train(out, ckpt, *options):
        run(monkeypatch, distill, tmp_path / out, "--ckpt", ckpt, "--data", files / "pairs",
            *SMALL, *options)
        return tmp_path / out / "model.safetensors"
    first = train("decoder", files / "stage1.safetensors")
    second = train("both", first, "--part", "encoder")
    model = DepthMaster.from_file(second)
    assert model.tiny_encoder and model.config["tiny_decoder"]["half_size"]
    for name, tensor in DepthMaster.from_file(first).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    third = train("again", second, "--steps", 1, "--warmup", 1)  # whose rate is 0
    assert third.read_bytes() == second.read_bytes()
    fewer = train("unet", second, "--part", "unet", "--drop", "mid.attention")
    again = train("fewer", fewer, "--part", "unet", "--drop", "up.0.attentions.0")
    assert DepthMaster.from_file(again).config["unet"]["drop"] == [
        "mid.attention", "up.0.attentions.0"]


def test_bad_input_is_one_sentence(files, tmp_path, monkeypatch, capsys, streets):
    def refused(*options, code=1):
        assert call(monkeypatch, distill, "--data", files / "pairs", "--out", tmp_path / "out",
                    "--device", "cpu", *options) == code
        assert not (tmp_path / "out/model.safetensors").exists()
        return capsys.readouterr().err
    ckpt = "--ckpt", files / "stage1.safetensors"
    assert "is not there: give a trained model" in refused("--ckpt", tmp_path / "none")
    assert "--part unet needs --drop" in refused(*ckpt, "--part", "unet", code=2)
    assert "no other part takes it" in refused(*ckpt, "--drop", "mid", code=2)
    assert "there is no block 'middle'" in refused(*ckpt, "--part", "unet", "--drop", "middle")
    (tmp_path / "empty").mkdir()
    assert "is empty; give the root" in refused(*ckpt, "--data", tmp_path / "empty")
    shutil.copytree(files / "pairs", tmp_path / "above/pairs")
    assert "above/pairs is: give that" in refused(*ckpt, "--data", tmp_path / "above")
    model = DepthMaster.from_file(files / "stage1.safetensors")
    for part in ("encoder", "decoder"):
        distill.objective_of(model, part, [], 8, 1)
    model.vae, model.config["vae"] = None, False
    model.save(tmp_path / "alone.safetensors")
    assert "has only the tiny autoencoder" in refused("--ckpt", tmp_path / "alone.safetensors")
    pictures = tmp_path / "pictures"
    shutil.copytree(files / "pairs/train/rgb", pictures)
    assert "holds pictures without depth: leave out --vkitti" in refused(
        *ckpt, "--data", pictures, "--vkitti", streets, "--vkitti-crop", *CROP)
