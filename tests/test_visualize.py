"""Witnesses: numpy's SVD, sums known on paper, and backbones whose attention and tokens are made here."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dino.backbone.resnet import SmallResNet
from dino.backbone.vit import ViT
from dino.backbone.vit_tiny import ViTTiny
from dino.config import CONF, compose
from dino.config.settings import Visualize, settings_of
from dino.head import DinoProjectionHead
from dino.model import DinoModel
from dino.report.attention import attention_maps, grid_of, mass_mask, patch_tokens, pca_rgb, principal_colours
from dino.report.pictures import images_in, overlay, painted, row_of
from dino.runtime.refused import Refused
from dino.visualize import main, visualize
from dino.weights import save_teacher

PREPROCESSING = {"size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class Known(nn.Module):
    """Patches of 4 pixels. Head h attends to patch i by (h + 1) * i + 1; token i is full of i, CLS of -1."""

    output_dim = 5

    def _patches(self, images):
        return (images.shape[-2] // 4) * (images.shape[-1] // 4)

    def forward(self, images):
        return self.tokens(images)[:, 0]

    def tokens(self, images):
        patches = torch.arange(-1.0, self._patches(images))
        return patches[None, :, None].expand(len(images), -1, 5)

    def attention(self, images):
        patches = self._patches(images)
        cls = torch.stack([torch.cat([torch.tensor([2.0]), (h + 1) * torch.arange(patches) + 1.0]) for h in range(3)])
        rows = torch.full((len(images), 3, patches + 1, patches + 1), -7.0)  # of the other tokens: never looked at
        rows[:, :, 0] = cls / cls.sum(-1, keepdim=True)
        return rows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "backbone, cell",
    [
        (ViTTiny(hidden_dim=32, depth=2, heads=4, image_size=32), 8),
        (ViT(hidden_dim=32, depth=2, heads=4, patch_size=8, image_size=32), 8),
    ],
    ids=["vit_tiny", "vit"],
)
@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (96, 48), (48, 112)])
def test_maps_and_tokens_are_those_of_the_patches_at_any_size(backbone, cell, height, width):
    images = torch.randn(2, 3, height, width)
    maps, tokens = attention_maps(backbone, images), patch_tokens(backbone, images)
    backbone.eval()
    with torch.no_grad():
        weights, whole = backbone.attention(images), backbone.tokens(images)
    assert maps.shape == (2, 4, height // cell, width // cell)
    assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5)
    assert torch.allclose(maps.sum((-2, -1)) + weights[:, :, 0, 0], torch.ones(2, 4), atol=1e-5)
    columns = width // cell
    for row, column in ((0, 1), (1, 0), (height // cell - 1, columns - 1)):
        assert torch.equal(maps[:, :, row, column], weights[:, :, 0, 1 + row * columns + column])
        assert torch.equal(tokens[:, row, column], whole[:, 1 + row * columns + column])


def test_attention_of_a_known_backbone_is_the_known_map_of_each_head():
    maps = attention_maps(Known(), torch.zeros(1, 3, 8, 12))
    for head, total in enumerate((2 + 6 + 15, 2 + 6 + 30, 2 + 6 + 45)):
        expected = [[((head + 1) * (3 * row + column) + 1) / total for column in range(3)] for row in range(2)]
        assert maps[0, head].tolist() == [pytest.approx(row) for row in expected]


def test_looking_leaves_the_backbone_in_the_modes_that_it_was_in_and_has_no_gradients():
    backbone = ViTTiny(hidden_dim=32, depth=2, heads=2, image_size=32, drop_path=0.9).train()
    backbone.norm.eval()
    images, modes = torch.randn(1, 3, 32, 32), [module.training for module in backbone.modules()]
    first, second = attention_maps(backbone, images), attention_maps(backbone, images)
    assert torch.equal(first, second) and not first.requires_grad  # no path is dropped
    assert [module.training for module in backbone.modules()] == modes


def test_a_resnet_has_no_attention_but_places_and_says_so():
    backbone = SmallResNet(width=8)
    with pytest.raises(ValueError, match="SmallResNet has no attention; expected a ViT"):
        attention_maps(backbone, torch.zeros(1, 3, 64, 64))
    assert patch_tokens(backbone, torch.zeros(1, 3, 64, 96)).shape == (1, 4, 6, 64)
    with pytest.raises(ValueError, match=r"Linear has no tokens\(images\)"):
        patch_tokens(nn.Linear(1, 1), torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize("side", [1, 7, 8, 14, 16])
def test_a_grid_is_found_from_the_number_of_its_patches(side):
    for height in (16, 33, 64, 100):
        for width in (16, 40, 99):
            dropped, kept = (height // side, width // side), (-(-height // side), -(-width // side))
            assert grid_of(dropped[0] * dropped[1], height, width) == dropped
            rows, columns = grid_of(kept[0] * kept[1], height, width)
            assert rows * columns == kept[0] * kept[1]
    with pytest.raises(ValueError, match="7 square patches do not cover an image of 32 x 32"):
        grid_of(7, 32, 32)


def test_the_mask_is_the_fewest_patches_that_hold_the_mass():
    maps = torch.tensor([[0.05, 0.30], [0.25, 0.40]])
    assert mass_mask(maps, 0.6).tolist() == [[False, True], [False, True]]
    assert mass_mask(maps, 0.75).tolist() == [[False, True], [True, True]]
    assert mass_mask(maps, 1.0).all()
    for masked in mass_mask(torch.stack([maps, maps.T])):
        assert masked.sum() == 2
    with pytest.raises(ValueError, match=r"mass must be a fraction .* got 0.0"):
        mass_mask(maps, 0.0)


def test_components_are_those_of_the_singular_value_decomposition():
    tokens = torch.randn(2, 5, 6, 9) @ torch.diag(torch.arange(9.0, 0, -1)) + 3
    rgb = pca_rgb(tokens)
    assert rgb.shape == (2, 5, 6, 3)
    points = tokens.flatten(0, 2).double().numpy()
    centred = points - points.mean(0)
    values = centred @ np.linalg.svd(centred)[2][:3].T
    for component in range(3):
        ours, theirs = rgb[..., component].flatten().numpy(), values[:, component]
        inside = (ours > 0) & (ours < 1)  # but for the ends, which are cut
        assert inside.mean() > 0.95
        slope, _ = np.polyfit(theirs[inside], ours[inside], 1)
        low, high = np.quantile(theirs, (0.01, 0.99))
        assert abs(slope) == pytest.approx(1 / (high - low), rel=1e-3)
        assert abs(np.corrcoef(ours[inside], theirs[inside])[0, 1]) == pytest.approx(1, abs=1e-5)


def test_tokens_on_a_line_make_a_ramp_of_one_colour_over_all_images_together():
    rgb = pca_rgb(torch.arange(24.0).view(2, 3, 4, 1) * torch.ones(5))
    ramp = rgb[..., 0].flatten()
    ramp = ramp if ramp[0] < ramp[-1] else 1 - ramp
    steps = ramp.diff()[1:-1]
    assert torch.allclose(steps, steps.mean().expand_as(steps), atol=1e-5) and steps.mean() > 0.04
    assert ramp[0] == 0 and ramp[-1] == 1
    assert torch.equal(rgb[..., 1:], torch.full((2, 3, 4, 2), 0.5))


def test_the_background_is_black_and_has_no_part_in_the_components():
    tokens = torch.randn(40, 6)
    foreground = torch.arange(40) % 2 == 0
    alone = principal_colours(tokens[foreground])
    far = tokens.clone()
    far[~foreground] *= 1000
    colours = principal_colours(far, foreground)
    assert torch.equal(colours[foreground], alone)
    assert not colours[~foreground].any()
    assert not principal_colours(tokens, torch.zeros(40, dtype=torch.bool)).any()


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (2, 2), (6, 4)])
def test_tokens_that_are_all_alike_are_grey(shape):
    assert torch.equal(principal_colours(torch.ones(shape)), torch.full((shape[0], 3), 0.5))


def test_heat_is_bright_where_it_is_most_and_dark_where_least():
    grey = Image.new("RGB", (40, 20), (128, 128, 128))
    pixels = np.asarray(overlay(grey, torch.tensor([[0.1, 0.7]]), strength=1.0)).astype(int)
    assert pixels[:, 0].tolist() == [[0, 0, 3]] * 20  # the ends of matplotlib's inferno
    assert pixels[:, -1].tolist() == [[252, 254, 164]] * 20
    assert np.array_equal(np.asarray(overlay(grey, torch.tensor([[0.1, 0.7]]), strength=0.0)), np.asarray(grey))
    assert len(overlay(grey, torch.ones(2, 2)).getcolors()) == 1


def test_patches_are_painted_as_squares():
    picture = painted(torch.tensor([[[1.0, 0, 0], [0, 0.5, 1.0]]]), (4, 2))
    assert np.asarray(picture).tolist() == [[[255, 0, 0]] * 2 + [[0, 128, 255]] * 2] * 2
    row = row_of({"a": picture, "b": picture})
    assert row.getpixel((8, 22)) == (255, 0, 0) and row.getpixel((20, 22)) == (255, 0, 0)


# ---- the command ----------------------------------------------------------------------------------------------------


def saved(directory, backbone, node):
    model = DinoModel(backbone, DinoProjectionHead(backbone.output_dim, 16, 8, 32))
    head = {"_target_": "dino.head.DinoProjectionHead", "hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32}
    directory.mkdir()
    save_teacher(directory, model.state_dict(), {"backbone": node, "head": head}, PREPROCESSING)
    return directory


def settings(checkpoint, images, output, *overrides):
    given = [f"checkpoint={checkpoint}", f"images={images}", f"output={output}", *overrides]
    return settings_of(Visualize, compose(given, "visualize", CONF))


@pytest.fixture
def vit(tmp_path):
    node = {"hidden_dim": 32, "depth": 1, "heads": 2, "image_size": 32}
    return saved(tmp_path / "vit", ViTTiny(**node), {"_target_": "dino.backbone.vit_tiny.ViTTiny", **node})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in (1, 2, 10):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40 + 20 * (i == 10), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo_{i}.png")
    return folder


def test_the_command_writes_pictures_of_every_image(vit, folder, tmp_path, monkeypatch, capsys):
    (folder / "broken.png").write_bytes(b"none")
    out = tmp_path / "out"
    line = [f"checkpoint={vit}", f"images={folder}", f"output={out}", "size=64", f"neighbours={folder}", "mass=0.6"]
    monkeypatch.setattr(sys, "argv", ["visualize", *line, "foreground=true"])
    main()
    stems = [f"photo_{i}" for i in (1, 2, 10)]
    kinds = ("attention", "pca", "neighbours")
    assert {path.name for path in out.iterdir()} == {f"{stem}_{kind}.png" for stem in stems for kind in kinds}
    said = capsys.readouterr().out
    assert "broken.png: cannot be opened as an image" in said
    assert f"attention, pca, neighbours of 3 images in {out}" in said
    high, wide = 256, (4, 2, 3)  # image, mean, two heads; image, PCA; image and the two others, not itself
    for kind, pictures in zip(kinds, wide):
        others = 128 if kind == "neighbours" else 0  # one of them is half as wide again
        with Image.open(out / f"photo_1_{kind}.png") as sheet:
            assert sheet.size == (pictures * (high + 8) + 8 + others, high + 34)


def test_frames_are_numbered_in_their_order_and_make_an_animation(vit, folder, tmp_path):
    (folder / "photo_10.png").rename(folder / "photo_11.png")
    for path in folder.iterdir():
        with Image.open(path) as image:
            square = image.resize((48, 48))
        square.save(path)
    visualize(settings(vit, folder, tmp_path / "gif", "video=true", "fps=10"))
    visualize(settings(vit, folder, tmp_path / "webp", "video=true", "animation=webp"))
    assert sorted(path.name for path in (tmp_path / "gif").iterdir()) == sorted(
        ["attention.gif", "pca.gif"] + [f"{kind}_{i:04d}.png" for kind in ("attention", "pca") for i in (1, 2, 3)]
    )
    with Image.open(tmp_path / "gif" / "attention.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (3, 100)
    with Image.open(tmp_path / "webp" / "pca.webp") as animation:
        assert animation.n_frames == 3
    assert [path.name for path in images_in(folder)] == ["photo_1.png", "photo_2.png", "photo_11.png"]


def test_a_resnet_gives_what_it_has(tmp_path, folder):
    node = {"_target_": "dino.backbone.resnet.SmallResNet", "width": 8}
    run = saved(tmp_path / "resnet", SmallResNet(width=8), node)
    said = visualize(settings(run, folder / "photo_1.png", tmp_path / "out"))
    assert said == ["SmallResNet has no attention: no attention maps.", f"pca of 1 images in {tmp_path / 'out'}"]
    with pytest.raises(Refused, match="foreground=true: needs attention, and SmallResNet has none"):
        visualize(settings(run, folder, tmp_path / "out", "foreground=true"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ("images=nowhere", "^nowhere is not there; expected an image or a folder of images"),
        ("checkpoint=nowhere", "^nowhere is not there; expected a run's directory"),
        ("images=null", "^images=null: expected the path of an image or of a folder of images"),
        ("size=0", "^size=0: expected a whole number from 1 to 16384, or null"),
        ("k=-1", "^k=-1: expected a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(vit, folder, tmp_path, change, sentence):
    with pytest.raises((Refused, FileNotFoundError), match=sentence):
        visualize(settings(vit, folder, tmp_path / "out", change))


def test_a_folder_without_images_is_one_sentence_and_status_2(vit, tmp_path):
    (tmp_path / "empty").mkdir()
    line = [sys.executable, "-m", "dino.visualize", f"checkpoint={vit}", f"images={tmp_path / 'empty'}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{tmp_path / 'empty'} has no images; expected files that end in .jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, "
        ".ppm, .pgm, .gif, .avif."
    ]


def test_values_without_their_keys_are_told_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualize", "outputs/x", "size=64", "a photo.jpg"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().err.splitlines()) == (
        2,
        [
            "outputs/x: expected key=value; write checkpoint=outputs/x.",
            "a photo.jpg: expected key=value; write images=a photo.jpg.",
        ],
    )


def test_a_lack_of_memory_is_one_sentence(vit, folder, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dino.visualize.attention_maps", full)
    monkeypatch.setattr(sys, "argv", ["visualize", f"checkpoint={vit}", f"images={folder}", "size=64"])
    monkeypatch.chdir(vit.parent)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert (stopped.value.code, said) == (2, "size=64: there is not enough memory; give a smaller one.\n")
