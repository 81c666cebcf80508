"""Residual networks: torchvision's, and a small one for small images."""

from difflib import get_close_matches
from urllib.error import URLError

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock


class ResNet(nn.Module):
    """Any of torchvision's ResNets (resnet18 ... resnet152, ResNeXt, wide ResNet) without its classifier.

    pretrained: torchvision's default ImageNet weights, which are *supervised*; downloaded once into torch's cache.
    Raises FileNotFoundError when they are neither in the cache nor to be had.
    """

    def __init__(self, arch: str, pretrained: bool = False) -> None:
        super().__init__()
        known = models.list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*"])
        if arch not in known:
            nearest = get_close_matches(arch, known, n=1)
            hint = f"Did you mean {nearest[0]}?" if nearest else f"Choose from {', '.join(known)}."
            raise ValueError(f"ResNet: arch must be one of torchvision's ResNets, got {arch!r}. {hint}")
        try:
            self.network = models.get_model(arch)
            if pretrained:
                weights = models.get_model_weights(arch).DEFAULT
                self.network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
        except URLError as error:
            raise FileNotFoundError(
                f"ResNet: the pretrained weights of {arch} are not in torch's cache and cannot be downloaded "
                f"({error.reason}). Connect to a network once, or set backbone.pretrained=false."
            ) from error
        self.output_dim: int = self.network.fc.in_features
        self.network.fc = nn.Identity()

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The last feature map, averaged over the image."""
        features: Tensor = self.network(images)
        return features

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """The features, then the places of the last feature map row by row: what a ViT has in CLS and patches."""
        net = self.network
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return mean_and_places(net.layer4(net.layer3(net.layer2(net.layer1(stem)))))


class SmallResNet(nn.Module):
    """Four stages of one basic block behind a 3x3 stride-2 stem; for images of 32 to 128 pixels on a CPU.

    torchvision's ResNets divide a 64-pixel image by four before their first block; this one by two.
    width: channels of the first stage; each later stage halves the image and doubles the channels.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        if width < 8:
            raise ValueError(
                f"SmallResNet: width must be at least 8, got {width}; torch's convolutions crash on fewer channels."
            )
        self.output_dim = 8 * width
        self.stem = nn.Sequential(*convolution(3, width, kernel_size=3, stride=2), nn.ReLU(inplace=True))
        stages: list[nn.Module] = [BasicBlock(width, width)]
        for channels in (width, 2 * width, 4 * width):
            shortcut = nn.Sequential(*convolution(channels, 2 * channels, kernel_size=1, stride=2))
            stages.append(BasicBlock(channels, 2 * channels, stride=2, downsample=shortcut))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's ResNets
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch {self.output_dim}"]:
        """The last feature map, averaged over the image."""
        features: Tensor = self.stages(self.stem(images)).mean(dim=(-2, -1))
        return features

    def tokens(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens {self.output_dim}"]:
        """The features, then the places of the last feature map row by row: what a ViT has in CLS and patches."""
        return mean_and_places(self.stages(self.stem(images)))


def mean_and_places(features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch tokens dim"]:
    return torch.cat([features.mean(dim=(-2, -1))[:, None], features.flatten(2).mT], dim=1)


def convolution(channels_in: int, channels_out: int, kernel_size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A convolution that keeps the image's size but for its stride, and the batch norm that makes a bias needless."""
    padding = kernel_size // 2
    return (
        nn.Conv2d(channels_in, channels_out, kernel_size, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(channels_out),
    )
