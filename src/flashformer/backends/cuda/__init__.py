"""The CUDA kernel: device sources specialised for a Program and a GPU, compiled by NVRTC, launched cooperatively."""
