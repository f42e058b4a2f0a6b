"""What the zoo's families share: a convolution, the block of one, and how weights start."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ConvBnRelu", "conv", "initialize"]


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, but for its stride."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


def initialize(model: nn.Module) -> None:
    """He initialization by fan-out (He et al. 2015) for convolutions; batch norms stay identity, the bias is zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class ConvBnRelu(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C_in, H, W]`` → ``[B, C_out, H/stride, W/stride]``, activated."""
        y: Tensor = self.relu1(self.bn1(self.conv1(x)))
        return y
