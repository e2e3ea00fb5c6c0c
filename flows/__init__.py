"""Order, retries, caching, tracking: what joins the library to Prefect and MLflow."""
