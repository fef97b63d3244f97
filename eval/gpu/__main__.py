"""``python -m pikv_hf.eval.gpu``: check and measure the kernels on an NVIDIA GPU."""

from pikv_hf.eval.gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
