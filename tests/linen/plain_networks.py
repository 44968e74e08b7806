"""Networks of plain Flax, as users write them."""

import flax.linen as nn


class PlainCNN(nn.Module):
    """Convolutions, max pools, dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021), with a float image."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (8, 8), strides=(8, 8), name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        for i in range(2):
            y = nn.LayerNorm(name=f"norm_tokens{i}")(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1], name=f"tokens{i}_2")(nn.gelu(nn.Dense(16, name=f"tokens{i}_1")(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.LayerNorm(name=f"norm_channels{i}")(x)
            y = nn.Dense(self.width, name=f"channels{i}_2")(nn.gelu(nn.Dense(32, name=f"channels{i}_1")(y)))
            x = x + y
        x = nn.LayerNorm(name="norm")(x).mean(1)
        return nn.Dense(10, name="head")(x)


class InvertedResidual(nn.Module):
    """Of MobileNetV2 (Sandler et al. 2018)."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        wide = 4 * x.shape[-1]
        norm = lambda x: nn.BatchNorm(use_running_average=not train)(x)  # noqa: E731
        y = nn.relu6(norm(nn.Conv(wide, (1, 1), use_bias=False, name="expand")(x)))
        depthwise = nn.Conv(
            wide, (3, 3), self.strides, feature_group_count=wide, use_bias=False, name="depthwise"
        )
        y = nn.relu6(norm(depthwise(y)))
        y = norm(nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """A small network of inverted residuals."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="stem")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=not train)(x))
        for features, strides in ((8, 1), (16, 2), (16, 1)):
            x = InvertedResidual(features, strides)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class EncoderBlock(nn.Module):
    """Of a vision transformer (Dosovitskiy et al. 2021)."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
        y = nn.LayerNorm()(x)
        y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(2 * x.shape[-1])(y)))
        return x + y


class Transformer(nn.Module):
    """A small vision transformer."""

    width: int = 16

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (8, 8), strides=(8, 8), name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        places = self.param("places", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + places
        for _ in range(2):
            x = EncoderBlock()(x)
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


NETWORKS = {"cnn": PlainCNN, "mixer": Mixer, "mobilenet": MobileNet, "transformer": Transformer}
