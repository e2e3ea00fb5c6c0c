# proxyrob on one image: the command line, flows and workers. Build: docker build -t proxyrob .
FROM python:3.11-slim

WORKDIR /opt/proxyrob

COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN python -m venv .venv \
 && .venv/bin/python -m pip install --quiet uv \
 && VIRTUAL_ENV=.venv .venv/bin/uv pip install --compile-bytecode --requirements requirements.lock

COPY proxyrob proxyrob
COPY flows flows
COPY deployments deployments
RUN VIRTUAL_ENV=.venv .venv/bin/uv pip install --no-deps --no-build-isolation .

RUN useradd --create-home --uid 1000 proxyrob && mkdir /data && chown proxyrob /data
USER proxyrob
ENV PATH=/opt/proxyrob/.venv/bin:$PATH PROXYROB_HOME=/data
VOLUME /data
ENTRYPOINT ["proxyrob"]
CMD ["run", "digits"]
