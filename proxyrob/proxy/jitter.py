"""The control: training images plus Gaussian noise."""

import numpy as np
from jaxtyping import Int64, UInt8

from proxyrob.config.proxy import JitterProxy
from proxyrob.rng import Streams
from proxyrob.source import read_split
from proxyrob.storage import Stage


class JitterSampler:
    """Image i is training image i mod n plus noise from seed i, clipped to [0,1] and rounded to 256 levels."""

    def __init__(self, config: JitterProxy, *, source: Stage, seed: int) -> None:
        self.config = config
        self.stored = read_split(source, "train").stored
        self.streams = Streams(seed)

    def sample(self, ids: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w c"]:
        """The images of ``ids``.

        Randomness: ``proxy/sample`` by image.
        """
        shape = self.stored.shape[1:]
        noise = np.stack([self.streams.numpy("proxy/sample", image=int(i)).standard_normal(shape) for i in ids])
        noisy = self.stored[ids % len(self.stored)] + 255.0 * self.config.sigma * noise
        return np.rint(noisy.clip(0.0, 255.0)).astype(np.uint8)
