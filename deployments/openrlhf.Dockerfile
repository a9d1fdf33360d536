# A node of a Ray cluster (or a single machine) that trains with trainer `openrlhf`. From the root of the clone:
#   docker build --file deployments/openrlhf.Dockerfile --tag registry.example.com/jfhpo-openrlhf .
# The base image has nvcc, which DeepSpeed compiles its optimizer with.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:latest /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python

COPY deployments/openrlhf-gpu.txt /tmp/
RUN uv venv --python 3.11 /opt/openrlhf && \
    uv pip install --no-cache --python /opt/openrlhf --no-deps --require-hashes --requirement /tmp/openrlhf-gpu.txt

WORKDIR /opt/jfhpo
COPY . .
RUN uv venv --python 3.11 /opt/venv && \
    uv pip install --no-cache --python /opt/venv --constraint constraints.txt '.[all]'

ENV PATH=/opt/venv/bin:$PATH JFHPO_OPENRLHF_PYTHON=/opt/openrlhf/bin/python
