# Tandem with Ray and vLLM for NVIDIA GPUs:  docker build -t tandem-rlhf:latest .
# No docker was at hand where this file was written, so the image has not been built there. What was done there: pip's
# dry run of the install line for Python 3.12, which found versions that go together.
# CUDA's libraries come with the wheels of torch and vLLM; the host needs NVIDIA's driver and container toolkit. The base
# has the C compiler that Triton calls at run time, so the slim one will not do.
FROM python:3.12

WORKDIR /opt/tandem
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY tandem tandem
COPY recipes recipes

# Only these pins: vLLM's CUDA build wants an older numpy than constraints.txt as a whole.
RUN grep -E '^(torch|transformers|datasets|ray)==' constraints.txt > /tmp/pins.txt \
 && pip install --no-cache-dir -c /tmp/pins.txt '.[cluster,vllm]'

WORKDIR /workspace
CMD ["tandem", "--help"]
