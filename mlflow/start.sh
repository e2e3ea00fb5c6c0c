#!/bin/sh
# Start the tracking server and registry; see README.md. Ready after 10 to 70 seconds.
set -eu
exec "${PYTHON:-.venv/bin/python}" -m mlflow server --workers "${MLFLOW_WORKERS:-1}" \
  --backend-store-uri "$MLFLOW_BACKEND_STORE_URI" --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION" \
  --host "$MLFLOW_HOST" --port "$MLFLOW_PORT" --allowed-hosts "$MLFLOW_SERVER_ALLOWED_HOSTS"
