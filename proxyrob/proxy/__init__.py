"""Proxy distributions: generators fitted to the training images, published sample sets, and images in shards."""

from proxyrob.proxy.diffusion import ProxyReport, fit_diffusion
from proxyrob.proxy.published import ImportReport, adopt_samples, import_samples, pin_proxy
from proxyrob.proxy.sampling import SamplesReport, sample_proxy

__all__ = [
    "ImportReport",
    "ProxyReport",
    "SamplesReport",
    "adopt_samples",
    "fit_diffusion",
    "import_samples",
    "pin_proxy",
    "sample_proxy",
]
