"""Servers, workers and deployments, and what looks after them."""
