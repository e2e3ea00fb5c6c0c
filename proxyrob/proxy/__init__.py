"""Proxy distributions: generators fitted to the training images, and their samples in shards."""

from proxyrob.proxy.diffusion import ProxyReport, fit_diffusion
from proxyrob.proxy.sampling import SamplesReport, sample_proxy

__all__ = ["ProxyReport", "SamplesReport", "fit_diffusion", "sample_proxy"]
