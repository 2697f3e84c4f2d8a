# vlm_sft_rl in a container: on a CPU by default, on GPUs with a base that has CUDA.
#   docker build -t vlm-sft-rl .
#   docker build -t vlm-sft-rl --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg EXTRAS=serve,quant,deepspeed .
#   docker run --rm -p 8000:8000 vlm-sft-rl                                  # the shipped model, on a page
#   docker run --rm --gpus all -v "$PWD:/home/user/work" -w /home/user/work vlm-sft-rl train RECIPE …
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=serve,quant
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# the base decides which Python there is
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/venv
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[${EXTRAS}]" -c constraints.txt \
    && useradd --create-home --uid 10001 user
USER 10001
WORKDIR /home/user
EXPOSE 8000
ENTRYPOINT ["vlm-sft-rl"]
CMD ["serve", "pocket", "--host", "0.0.0.0"]
