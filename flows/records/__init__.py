"""What is written down: runs and registered models in MLflow, the report of a run."""
