"""Robust image classifiers from real images and samples of a proxy distribution.

The library: mathematics and data. It knows neither Prefect nor MLflow; the package ``flows`` joins it to them.
"""

__version__ = "0.1.0"
