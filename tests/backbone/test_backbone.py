"""Witnesses: torchvision, transformers and timm called directly with the same weights, and formulas written out."""

import importlib.util
from collections import Counter
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from dino.backbone.resnet import ResNet, SmallResNet
from dino.backbone.timm import Timm
from dino.backbone.transformer import FUSED_FROM, FUSED_FROM_IN_HALF, Block, resized, weights
from dino.backbone.vit import ViT, renamed
from dino.backbone.vit_tiny import ViTTiny

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")

SMALL_VIT = {"hidden_dim": 48, "depth": 3, "heads": 3, "patch_size": 8, "image_size": 32}
BUILD = {
    "resnet18": lambda: ResNet("resnet18"),
    "resnet_small": lambda: SmallResNet(width=8),
    "vit": lambda: ViT(**SMALL_VIT),
    "vit_tiny": lambda: ViTTiny(hidden_dim=32, depth=2, heads=2, image_size=32),
    "timm_resnet": lambda: Timm("resnet10t"),
    "timm_vit": lambda: Timm("vit_tiny_patch16_224", depth=1),
    "timm_mobilenet": lambda: Timm("mobilenetv3_small_050"),
}
CASES = [pytest.param(build, id=name, marks=needs_timm if "timm" in name else ()) for name, build in BUILD.items()]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scaled_up(module, factor=3.0):
    """Weights large enough that wrong heads, axes or positions show in the output (the initial ones hide them)."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return module


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
def test_a_backbone_gives_output_dim_features_an_image_at_any_size(build, height, width):
    backbone = build().eval()
    images = torch.randn(3, 3, height, width)
    features = backbone(images)
    assert features.shape == (3, backbone.output_dim)
    # An image's features do not depend on what else is in the batch.
    assert torch.allclose(backbone(images[1:2]), features[1:2], atol=1e-4)
    assert not torch.allclose(features[0], features[1], atol=1e-4)


@pytest.mark.parametrize("build", CASES)
def test_every_parameter_of_a_backbone_gets_a_gradient(build):
    backbone = build()
    backbone(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("build", CASES)
def test_a_backbone_can_be_built_on_the_meta_device(build):
    with torch.device("meta"):
        assert next(build().parameters()).is_meta


# ------------------------------------------------------------------------------------------------ ResNets


def test_resnet_is_torchvisions_network_before_its_classifier():
    ours = ResNet("resnet18").eval()
    theirs = resnet18().eval()
    missing = theirs.load_state_dict(ours.network.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    before_fc = []
    theirs.fc.register_forward_pre_hook(lambda module, inputs: before_fc.append(inputs[0]))
    images = torch.randn(2, 3, 64, 48)
    theirs(images)
    assert torch.equal(ours(images), before_fc[0])


@pytest.mark.parametrize("arch, output_dim", [("resnet34", 512), ("resnet50", 2048), ("resnet152", 2048)])
def test_output_dim_follows_the_architecture(arch, output_dim):
    with torch.device("meta"):
        assert ResNet(arch).output_dim == output_dim


def test_a_misspelt_resnet_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"got 'resnet81'\. Did you mean resnet18\?"):
        ResNet("resnet81")


def test_pretrained_resnet_weights_without_a_network_are_a_sentence(monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(FileNotFoundError, match=r"weights of resnet18 .* \(no route to host\)\. .*pretrained=false"):
        ResNet("resnet18", pretrained=True)


def test_the_small_resnet_is_the_recipes_network():
    backbone = SmallResNet()
    assert backbone.output_dim == 256
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(1.2e6, rel=0.05)  # "1.2 M parameters"
    shapes = []
    for layer in (backbone.stem, *backbone.stages):
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    backbone(torch.randn(2, 3, 64, 64))
    assert shapes == [(32, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]


@pytest.mark.parametrize("build, last", [("resnet18", "network.layer4"), ("resnet_small", "stages.3")])
def test_a_resnets_tokens_are_its_features_and_each_place_of_its_last_map(build, last):
    backbone, maps = BUILD[build]().eval(), []
    backbone.get_submodule(last).register_forward_hook(lambda module, inputs, output: maps.append(output))
    images = torch.randn(2, 3, 96, 64)
    tokens = backbone.tokens(images)
    (features,) = maps
    rows, columns = features.shape[-2:]
    assert (rows, columns) == ((3, 2) if build == "resnet18" else (6, 4))
    assert torch.allclose(tokens[:, 0], backbone(images), atol=1e-6)
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(tokens[:, 1 + row * columns + column], features[:, :, row, column])


# ------------------------------------------------------------------------------------------------ ViT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved Hugging Face ViT (with pooler, as facebook/dino-*): the folder, and the model."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    config = ViTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192)
    config.patch_size, config.image_size = 8, 32
    config._attn_implementation = "eager"  # so that it tells its attention
    model = scaled_up(ViTModel(config), 6.0).eval()
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return str(folder), model


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 26)])
def test_a_pretrained_vit_equals_transformers_called_directly(checkpoint, size):
    folder, theirs = checkpoint
    ours = ViT(**SMALL_VIT | {"image_size": 224}, pretrained=folder).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True, output_attentions=True)
        assert torch.allclose(ours.tokens(images), expected.last_hidden_state, atol=1e-4)
        assert torch.allclose(ours(images), expected.last_hidden_state[:, 0], atol=1e-4)
        assert torch.allclose(ours.attention(images), expected.attentions[-1], atol=1e-5)
    assert not torch.allclose(expected.attentions[-1], expected.attentions[-2], atol=1e-2)


def test_without_pretrained_the_vit_is_transformers_of_the_same_config(checkpoint):
    _, theirs = checkpoint
    ours = ViT(**SMALL_VIT).eval()
    shapes = {name: tensor.shape for name, tensor in renamed(theirs.state_dict()).items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    for drawn in (ours.positions, ours.patches.weight, ours.blocks[0].qkv.weight, ours.blocks[0].mlp[2].weight):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_pretrained_vit_of_another_architecture_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"depth=3, .*but hidden_dim=48, depth=4, .* was asked for"):
        ViT(**SMALL_VIT | {"depth": 4}, pretrained=checkpoint[0])


def test_pretrained_true_names_the_published_architectures_when_there_is_none():
    with pytest.raises(ValueError, match=r"no weights for hidden_dim=48, .* one of facebook/dino-vits8, "):
        ViT(**SMALL_VIT, pretrained=True)


@pytest.mark.parametrize(
    "hidden_dim, heads, patch_size, name",
    [(384, 6, 8, "vits8"), (384, 6, 16, "vits16"), (768, 12, 8, "vitb8"), (768, 12, 16, "vitb16")],
)
def test_pretrained_true_asks_for_the_authors_weights(monkeypatch, hidden_dim, heads, patch_size, name):
    from transformers import ViTConfig

    def not_cached(asked_for, *args, **kwargs):
        raise OSError(asked_for)

    monkeypatch.setattr(ViTConfig, "from_pretrained", not_cached)
    with pytest.raises(FileNotFoundError, match=rf"weights at facebook/dino-{name}: .*pretrained=false"):
        ViT(hidden_dim, 12, heads, patch_size, pretrained=True)


def test_a_pretrained_vit_with_another_activation_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, patch_size=8)
    config.hidden_act = "relu"
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an MLP of 192, relu and qkv_bias=True; expected 192, gelu and true"):
        ViT(**SMALL_VIT, pretrained=str(tmp_path))


def test_a_missing_folder_of_weights_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no pretrained weights at .*/nowhere: it is neither a folder"):
        ViT(**SMALL_VIT, pretrained=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"heads": 5}, "multiple of heads, got hidden_dim=48, heads=5"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"patch_size": 0}, "got patch_size=0"),
        ({"image_size": 4}, "got patch_size=8, image_size=4"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_vit_refuses_what_cannot_be(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ViT(**SMALL_VIT | change)


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"at least one patch \(8 pixels\) high and wide, got 7 x 16"):
        ViT(**SMALL_VIT)(torch.randn(1, 3, 7, 16))


# ------------------------------------------------------------------------------------------------ ViTTiny


def naive_vit_tiny(model, images):
    """Tokens and last attention, by loops over heads and no fused kernel; the stem is torch's own modules."""
    patches = model.stem(images)
    batch, dim, rows, columns = patches.shape
    positions = F.interpolate(model.positions, size=(rows, columns), mode="bicubic", align_corners=False)
    tokens = [model.cls_token[:, 0] + model.cls_position[:, 0]]
    tokens = [tokens[0].expand(batch, dim)]
    tokens += [patches[:, :, r, c] + positions[:, :, r, c] for r in range(rows) for c in range(columns)]
    hidden = torch.stack(tokens, dim=1)
    for block in model.blocks:
        normed = F.layer_norm(hidden, (dim,), block.norm1.weight, block.norm1.bias)
        size = dim // block.heads
        q, k, v = (
            normed @ block.qkv.weight[i * dim : (i + 1) * dim].T + block.qkv.bias[i * dim : (i + 1) * dim]
            for i in range(3)
        )
        heads, maps = [], []
        for h in range(block.heads):
            own = slice(h * size, (h + 1) * size)
            scores = torch.einsum("bnd,bmd->bnm", q[..., own], k[..., own]) / size**0.5
            maps.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
            heads.append(torch.einsum("bnm,bmd->bnd", maps[-1], v[..., own]))
        mixed = torch.cat(heads, dim=-1)
        hidden = hidden + mixed @ block.projection.weight.T + block.projection.bias
        normed = F.layer_norm(hidden, (dim,), block.norm2.weight, block.norm2.bias)
        inner = F.gelu(normed @ block.mlp[0].weight.T + block.mlp[0].bias)
        hidden = hidden + inner @ block.mlp[2].weight.T + block.mlp[2].bias
    return F.layer_norm(hidden, (dim,), model.norm.weight, model.norm.bias), torch.stack(maps, dim=1)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (20, 36)])
def test_vit_tiny_equals_the_transformer_written_out(size):
    model = scaled_up(ViTTiny(hidden_dim=32, depth=2, heads=4, image_size=32), 8.0).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        tokens, attention = naive_vit_tiny(model, images)
        assert torch.allclose(model.tokens(images), tokens, atol=1e-4)
        assert torch.allclose(model(images), tokens[:, 0], atol=1e-4)
        assert torch.allclose(model.attention(images), attention, atol=1e-5)


def through(block, hidden, cls_only=False):
    """A block on images of one size, [batch, tokens, dim]."""
    batch, tokens, dim = hidden.shape
    return block(hidden.flatten(0, 1), ((batch, tokens),), cls_only).view(batch, -1, dim)


@pytest.mark.parametrize("tokens", [9, FUSED_FROM])
def test_attention_written_out_and_fused_are_one_function(tokens):
    """On a CPU the number of tokens chooses between the two; elsewhere it is the fused kernel."""
    block = scaled_up(Block(32, heads=4), 8.0)
    hidden = torch.randn(2, tokens, 32)
    query, key, value = block._heads(block._qkv(hidden.flatten(0, 1)), 2, tokens)
    for mixed in (F.scaled_dot_product_attention(query, key, value), weights(query, key) @ value):
        expected = hidden + block.projection(mixed.transpose(1, 2).flatten(2))
        expected = expected + block.mlp(block.norm2(expected))
        assert torch.allclose(through(block, hidden), expected, atol=1e-4)
        assert torch.allclose(through(block, hidden, cls_only=True), expected[:, :1], atol=1e-4)


@pytest.mark.parametrize("grid, other", [((14, 14), (6, 6)), ((8, 8), (4, 9)), ((3, 3), (7, 2)), ((1, 1), (2, 2))])
def test_positions_are_resized_as_torch_interpolates_them_with_its_gradient(grid, other):
    positions = torch.randn(1, 5, *grid, requires_grad=True)
    ours, torchs = resized(positions, *other), F.interpolate(positions, size=other, mode="bicubic")
    assert torch.allclose(ours, torchs, atol=1e-5)
    of_out = torch.randn_like(ours)
    gradients = [torch.autograd.grad(out, positions, of_out)[0] for out in (ours, torchs)]
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("patch_size, widths", [(4, [16, 32]), (8, [8, 16, 32]), (16, [4, 8, 16, 32])])
def test_the_stem_halves_the_image_once_a_convolution_and_doubles_its_channels(patch_size, widths):
    model = ViTTiny(hidden_dim=32, depth=1, heads=1, patch_size=patch_size)
    convolutions = [m for m in model.stem if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [*widths, 32]
    assert model.stem(torch.randn(2, 3, 64, 64)).shape[-2:] == (64 // patch_size, 64 // patch_size)


def test_the_position_of_a_patch_counts(monkeypatch):
    model = scaled_up(ViTTiny(hidden_dim=32, depth=1, heads=2, image_size=32), 8.0).eval()
    left = torch.zeros(1, 3, 32, 32)
    left[..., :8] = 1.0
    patches = model.stem(left).detach()

    def features_of(patches):
        monkeypatch.setattr(model.stem, "forward", lambda images: patches)
        return model(left)

    with torch.no_grad():
        moved = patches.roll(2, dims=-1)
        assert not torch.allclose(features_of(patches), features_of(moved), atol=1e-3)
        model.positions.zero_()
        assert torch.allclose(features_of(patches), features_of(moved), atol=1e-4)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"patch_size": 12}, "power of two from 2 up .*, got 12"),
        ({"patch_size": 0}, "power of two from 2 up .*, got 0"),
        ({"heads": 3}, "multiple of heads, got hidden_dim=128, heads=3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"hidden_dim": 4}, "at least patch_size=8, .* got 4"),
        ({"image_size": 4}, "image_size must be at least patch_size=8, got 4"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
    ],
)
def test_vit_tiny_refuses_what_cannot_be(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        ViTTiny(**change)


# ------------------------------------------------------------------------------------------------ both ViTs


VITS = [
    pytest.param(lambda **more: ViT(**SMALL_VIT, **more), id="vit"),
    pytest.param(lambda **more: ViTTiny(hidden_dim=48, depth=3, heads=3, image_size=32, **more), id="vit_tiny"),
]


@pytest.mark.parametrize("build", VITS)
def test_drop_path_rises_linearly_over_the_blocks(build):
    assert [round(block.drop_path, 6) for block in build(drop_path=0.5).blocks] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("cls_only", [False, True])
def test_drop_path_leaves_branches_out_of_images_at_its_rate_and_scales_the_others(cls_only):
    block, computed = Block(8, heads=2, drop_path=0.3), []
    for branch in (block.projection, block.mlp[2]):  # each adds a constant 1
        torch.nn.init.zeros_(branch.weight)
        torch.nn.init.ones_(branch.bias)
        branch.register_forward_hook(lambda module, inputs, output: computed.append(len(output)))
    hidden, taken = torch.randn(10, 5, 8), torch.zeros(10)
    stream = hidden[:, :1] if cls_only else hidden
    for _ in range(400):
        added = through(block, hidden, cls_only) - stream
        times = added[:, 0, 0] * 0.7
        assert torch.allclose(added, times.round()[:, None, None].expand_as(added) / 0.7, atol=1e-4)
        taken += times
    assert (taken / 800).tolist() == pytest.approx([0.7] * 10, abs=0.065)  # 4 standard deviations of 800 draws
    rows = stream[0].shape[0]
    assert sum(computed) / rows == pytest.approx(taken.sum().item(), abs=0.5)  # left out, not multiplied by zero
    block.eval()
    assert torch.allclose(through(block, hidden, cls_only), stream + 2, atol=1e-5)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.95])
def test_drop_path_is_the_same_function_compiled_and_for_several_image_sizes(monkeypatch, cls_only, rate):
    """Compiled, what is left out is multiplied by zero; at a rate of 0.95 no image may be left."""
    block = scaled_up(Block(16, heads=2, drop_path=rate), 8.0)
    rows, shapes = torch.randn(10 * 5 + 4 * 3, 16, requires_grad=True), ((10, 5), (4, 3))
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiled=compiled: compiled)
        torch.manual_seed(0)
        out = block(rows, shapes, cls_only)
        results.append([out, *torch.autograd.grad(out.square().sum(), [rows, *block.parameters()])])
    for plain, of_compiled in zip(*results, strict=True):
        assert torch.allclose(plain, of_compiled, rtol=1e-4, atol=1e-3)
    monkeypatch.undo()
    whole = block.eval()(rows, shapes, cls_only)
    assert torch.allclose(results[0][0], whole, atol=0.1) == (rate == 0)
    alone = [through(block, part.view(*shape, 16), cls_only) for part, shape in zip(rows.split([50, 12]), shapes)]
    assert torch.allclose(whole, torch.cat([part.flatten(0, 1) for part in alone]), atol=1e-4)


class Count(TorchDispatchMode):
    """Calls of each operation."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_block_keeps_neither_norms_nor_gelu_for_the_backward_pass_and_computes_no_product_twice():
    block, kept, calls = Block(32, heads=2), [], Count()
    hidden = torch.randn(2, FUSED_FROM, 32, requires_grad=True)
    unit = hidden.nbytes

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in block.parameters()}:
            kept.append(tensor)
        return tensor

    with calls, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = through(block, hidden)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    # The stream twice, queries, keys and values, what they mix, and the MLP's four times wider input to its GELU.
    assert sum(storages.values()) <= (2 + 3 + 1 + 4) * unit + unit // 4
    with calls:
        out.sum().backward()
    assert calls.of["addmm"] == 4 and calls.of["mm"] == 8  # forward, and backward to inputs and weights
    assert calls.of["gelu"] == 2 and calls.of["native_layer_norm"] == 4


def test_in_half_precision_on_a_cpu_nothing_is_computed_again():
    block, calls = Block(32, heads=2), Count()
    with calls, torch.autocast("cpu", torch.bfloat16):
        through(block, torch.randn(2, 9, 32, requires_grad=True)).sum().backward()
    assert calls.of["gelu"] == calls.of["gelu_backward"] == 1
    assert calls.of["native_layer_norm"] == calls.of["native_layer_norm_backward"] == 2


@pytest.mark.parametrize("tokens", [9, FUSED_FROM, FUSED_FROM_IN_HALF])
def test_a_block_in_half_precision_has_the_gradients_of_fp32_to_its_rounding(tokens):
    """With gradients attention is written out up to many tokens, without them fused from few."""
    block = scaled_up(Block(32, heads=4), 4.0)
    hidden, of_out = torch.randn(2, tokens, 32, requires_grad=True), torch.randn(2, tokens, 32)
    wanted = [hidden, *block.parameters()]
    expected = through(block, hidden)
    gradients = torch.autograd.grad(expected, wanted, of_out)
    with torch.autocast("cpu", torch.bfloat16):
        out = through(block, hidden)
        with torch.no_grad():
            fused = through(block, hidden)
    for half, whole in zip(
        (out, fused, *torch.autograd.grad(out, wanted, of_out)), (expected, expected, *gradients), strict=True
    ):
        assert half.dtype == torch.float32 and (half - whole).norm() < 0.02 * whole.norm()  # bf16 rounds to 0.004


def test_a_branch_that_no_image_takes_has_gradients_of_zero():
    """Not none: DistributedDataParallel waits for every gradient."""
    block = Block(8, heads=2, drop_path=1 - 1e-6)
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    out = through(block, hidden)
    assert torch.equal(out, hidden)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("build", VITS)
def test_the_features_are_the_cls_token_and_their_gradient_is_its(build):
    backbone, images = scaled_up(build(), 8.0), torch.randn(2, 3, 32, 32)
    features, cls = backbone(images), backbone.tokens(images)[:, 0]
    assert torch.allclose(features, cls, atol=1e-4)
    names, parameters = zip(*backbone.named_parameters())
    both = [torch.autograd.grad(output.pow(3).sum(), parameters) for output in (features, cls)]
    for name, of_features, of_cls in zip(names, *both, strict=True):
        assert torch.allclose(of_features, of_cls, rtol=1e-3, atol=1e-3 * of_cls.abs().max().item()), name


@pytest.mark.parametrize("build", VITS)
def test_the_last_tokens_are_what_each_of_the_last_layers_gives_normalised(build):
    backbone, images, given = build().eval(), torch.randn(2, 3, 32, 32), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: given.append(output))
    with torch.no_grad():
        last = backbone.last_tokens(images, 2)
        assert len(last) == 2 and len(given) == 3
        for ours, output in zip(last, given[1:]):
            assert torch.equal(ours.flatten(0, 1), backbone.norm(output))
        assert torch.equal(last[-1], backbone.tokens(images))


@pytest.mark.parametrize("build", VITS)
def test_gradient_checkpointing_changes_no_gradient_and_runs_the_layers_twice(build):
    plain, frugal = build(), build(gradient_checkpointing=True)
    frugal.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    calls = []
    frugal.blocks[1].projection.register_forward_hook(lambda *args: calls.append(1))
    for backbone in (plain, frugal):
        backbone(images).pow(3).sum().backward()
    assert len(calls) == 2
    for (name, one), (_, other) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name


# ------------------------------------------------------------------------------------------------ timm


@needs_timm
def test_timm_is_timms_own_model_without_classifier():
    import timm

    ours = Timm("resnet10t").eval()
    theirs = timm.create_model("resnet10t", num_classes=0).eval()
    theirs.load_state_dict(ours.network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@needs_timm
def test_options_reach_timm():
    assert len(Timm("vit_tiny_patch16_224", depth=2).network.blocks) == 2
    with pytest.raises(TypeError, match="no_such_option"):
        Timm("resnet10t", no_such_option=1)


@needs_timm
def test_timm_s_weights_that_are_not_to_be_had_are_said_with_the_key_to_set(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no pretrained weights of resnet10t are .* backbone.pretrained=false"):
        Timm("resnet10t", pretrained=True)


@needs_timm
def test_a_name_that_timm_does_not_know_is_told_near_ones():
    with pytest.raises(ValueError, match=r"got 'resnet10'\. Did you mean resnet10t"):
        Timm("resnet10")


def test_timm_where_it_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match=r"backbone resnet10t needs the timm package.*pip install timm"):
        Timm("resnet10t")
